"""What a release's `net.py` imports: its net, images, preprocessing and labels.

    from evaluator import scripting

    def net_init(cfg):
        return {"error": "", "net": scripting.net(cfg), "names": scripting.labels(cfg["tar_files"].get("labels.csv"))}

A script that was written for pycaffe may instead say ``from evaluator import scripting as caffe`` and go on with
``caffe.Net(prototxt, caffemodel, caffe.TEST)``, ``net.blobs["data"].data[...] = x`` and ``net.forward()``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atserving.errors import InvalidArgument, StartError
from evaluator import labels as labels_csv
from evaluator import preprocess
from evaluator.images import Pixels, decode
from evaluator.limits import Limits
from evaluator.net import TEST, Blob, Net
from evaluator.preprocess import Transformer, read_mean

__all__ = [
    "TEST",
    "Blob",
    "InvalidArgument",
    "Net",
    "StartError",
    "Transformer",
    "labels",
    "net",
    "read_image",
    "read_mean",
    "transformer",
]

_limits = Limits()


def begin(cfg: Mapping[str, Any]) -> None:
    """Makes the release's limits those of :func:`read_image`; called before ``net_init``. Raises StartError."""
    global _limits
    _limits = Limits.of_release(cfg["custom_values"])


def net(cfg: Mapping[str, Any], outputs: Sequence[str] = ()) -> Net:
    """The release's net, from ``deploy.prototxt`` and ``weight.caffemodel``, on the device it asks for.

    ``outputs`` names inner blobs that shall be outputs too. Has ``inputs`` and ``outputs`` (names),
    ``forward({name: array}) -> {name: array}``, float32 with the batch first, and pycaffe's ``blobs``. Raises
    StartError, which becomes the one line that says why the release does not start.
    """
    return Net.load(cfg, outputs)


def read_image(body: bytes) -> Pixels:
    """The image as (height, width, 3) uint8 in BGR, upright. What is no image or over the release's limits: 400."""
    return decode(body, _limits)


def transformer(cfg: Mapping[str, Any], shape: tuple[int, ...]) -> Transformer:
    """Makes a net's input of an image: a callable from what :func:`read_image` returns to ``shape``, float32.

    ``shape`` is (channels, height, width); a batch before these is ignored. Resizes, and then scales, swaps and
    subtracts as the release's ``custom_values`` and ``mean.binaryproto`` say. Raises StartError.
    """
    channels, height, width = shape[-3:]
    return preprocess.transformer(cfg, (channels, height, width))


def labels(path: str | Path | None) -> dict[int, str]:
    """The names of ``labels.csv`` by index; empty for None. Raises StartError."""
    return labels_csv.read(path)
