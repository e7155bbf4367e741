"""Workloads for an evaluator: a release of a small or a large net, and an image for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atserving.local.examples import FOLDER
from bench import photo
from bench.nets import mobilenet_v1
from examples.caffe_files import write_tar

_MEAN = (103.94, 116.78, 123.68)


@dataclass(frozen=True)
class Workload:
    """A release and an image to send to it."""

    name: str
    title: str
    """The net and the image, for a table."""
    tar: Path
    image: bytes
    mean: tuple[float, float, float]
    """The mean of each channel, BGR, for the bare loop to subtract from pixels."""
    custom_values: Mapping[str, Any]


def digits(_: Path) -> Workload:
    """The net of the example digits: most of a request is the service's own work."""
    image = (FOLDER / "digits" / "images" / "7.png").read_bytes()
    return Workload(
        "digits", "digits, PNG of 64x64", FOLDER / "digits" / "digits-v1.tar", image, (0, 0, 0), {"net": "classify"}
    )


def mobilenet(folder: Path) -> Workload:
    """MobileNet v1 with random weights and a large JPEG: most of a request is decoding and the net's work."""
    tar = folder / "mobilenet.tar"
    write_tar(tar, mobilenet_v1().files())
    values = {"net": "classify", "mean_values": list(_MEAN)}
    return Workload("mobilenet", "MobileNet v1, JPEG of 640x480", tar, photo.jpeg(640, 480), _MEAN, values)


WORKLOADS: Mapping[str, Callable[[Path], Workload]] = {"digits": digits, "mobilenet": mobilenet}
"""By name; each writes its files into a folder."""
