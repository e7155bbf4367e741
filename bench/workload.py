"""Workloads for an evaluator: a release of a small or a large net, and an image for it."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atserving.local.examples import DIGITS, FOLDER, Example
from bench import photo
from bench.nets import mobilenet_v1
from bench.picture_net import PictureNetFile
from evaluator.caffe import convert
from evaluator.runtime.preprocessing import read_mean
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
    custom_values: Mapping[str, Any]

    @property
    def example(self) -> Example:
        """The release as a local mesh serves it."""
        # A path from the root stays itself below the examples' folder. Any picture will do to see that it answers.
        return Example(self.name, "v1", str(self.tar), DIGITS[0].images, self.title, self.custom_values)

    def convert(self, folder: Path) -> PictureNetFile:
        """Convert the net into ``folder``, for those that run it without a mesh."""
        release = folder / f"{self.name}-release"
        with tarfile.open(self.tar) as archive:
            archive.extractall(release, filter="data")
        model, mean = folder / f"{self.name}.onnx", folder / f"{self.name}-mean.npy"
        model.write_bytes(convert(release / "deploy.prototxt", release / "weight.caffemodel").SerializeToString())
        image = release / "mean.binaryproto"
        values = self.custom_values.get("mean_values", [0, 0, 0])
        np.save(mean, read_mean(image) if image.exists() else np.array(values, np.float32).reshape(3, 1, 1))
        return PictureNetFile(str(model), str(mean))


def digits(_: Path) -> Workload:
    """The net of the example digits: most of a request is the service's own work."""
    image = (FOLDER / "digits" / "images" / "7.png").read_bytes()
    return Workload("digits", "digits, PNG of 64x64", FOLDER / "digits" / "digits-v1.tar", image, {"net": "classify"})


def mobilenet(folder: Path) -> Workload:
    """MobileNet v1 with random weights and a large JPEG: most of a request is decoding and the net's work."""
    tar = folder / "mobilenet.tar"
    write_tar(tar, mobilenet_v1().files())
    values = {"net": "classify", "mean_values": list(_MEAN)}
    return Workload("mobilenet", "MobileNet v1, JPEG of 640x480", tar, photo.jpeg(640, 480), values)


WORKLOADS: Mapping[str, Callable[[Path], Workload]] = {"digits": digits, "mobilenet": mobilenet}
"""By name; each writes its files into a folder."""
