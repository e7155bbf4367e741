"""The library for a release's ``net.py``: its net, images, preprocessing and labels.

    from evaluator import scripting

    def net_init(cfg):
        return {"error": "", "net": scripting.net(cfg), "names": scripting.labels(cfg["tar_files"].get("labels.csv"))}

A script for pycaffe may instead say ``from evaluator import scripting as caffe`` and go on with
``caffe.Net(prototxt, caffemodel, caffe.TEST)``, ``net.blobs["data"].data[...] = x`` and ``net.forward()``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atserving.errors import InvalidArgument, StartError
from evaluator.images import Pixels, decode
from evaluator.limits import Limits
from evaluator.net_config import NetConfig
from evaluator.nets import labels as labels_csv
from evaluator.runtime import net as net_module
from evaluator.runtime import preprocessing
from evaluator.runtime.net import TEST, Blob
from evaluator.runtime.preprocessing import Transformer, read_mean

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
    "set_device",
    "set_mode_cpu",
    "set_mode_gpu",
    "transformer",
]

_limits = Limits()
_device = "CPU"


def begin(config: NetConfig) -> None:
    """Set the limits of :func:`read_image` and the device of :class:`Net`. The worker calls this before ``net_init``.

    Raises StartError.
    """
    global _limits, _device
    _limits = config.limits
    _device = config.use_device


class Net(net_module.Net):
    """Any net of the tar, ``Net(prototxt, caffemodel, TEST)``, on the release's device."""

    def __init__(self, prototxt: str | Path, caffemodel: str | Path, phase: int = TEST, **options: Any) -> None:
        """See :class:`evaluator.runtime.net.Net`."""
        super().__init__(prototxt, caffemodel, phase, **{"use_device": _device, **options})


def set_mode_cpu() -> None:
    """Do nothing, as the release decides. Raises StartError if its ``use_device`` is a GPU."""
    if _device != "CPU":
        raise StartError(f"the script asks for the CPU, but use_device is {_device}")


def set_mode_gpu() -> None:
    """Do nothing, as the release decides. Raises StartError if its ``use_device`` is the CPU."""
    if _device == "CPU":
        raise StartError("the script asks for a GPU, but use_device is CPU")


def set_device(index: int) -> None:
    """Do nothing, as the release decides. Raises StartError if its ``use_device`` is not this GPU."""
    if _device != f"GPU:{index}" and (_device != "GPU" or index):
        raise StartError(f"the script asks for GPU {index}, but use_device is {_device}")


def net(cfg: Mapping[str, Any], outputs: Sequence[str] = ()) -> net_module.Net:
    """The release's net, from ``deploy.prototxt`` and ``weight.caffemodel``, on the device it asks for.

    ``outputs`` names inner blobs that shall be outputs too. Has ``inputs`` and ``outputs`` (names),
    ``forward({name: array}) -> {name: array}``, float32 with the batch first, and pycaffe's ``blobs``. Raises
    StartError, which becomes the one line that says why the release does not start.
    """
    return net_module.Net.load(NetConfig.from_cfg(cfg), outputs)


def read_image(body: bytes) -> Pixels:
    """Decode an image to (height, width, 3) uint8 in BGR, upright. Raises InvalidArgument: the caller gets a 400."""
    return decode(body, _limits)


def transformer(cfg: Mapping[str, Any], shape: tuple[int, ...]) -> Transformer:
    """Return a callable that makes a net's input, ``shape`` float32, from an image of :func:`read_image`.

    ``shape`` is (channels, height, width), perhaps after a batch axis. The callable resizes, scales, swaps channels and
    subtracts the mean as the release's ``custom_values`` and ``mean.binaryproto`` say. Raises StartError.
    """
    channels, height, width = shape[-3:]
    return preprocessing.transformer(NetConfig.from_cfg(cfg), (channels, height, width))


def labels(path: str | Path | None) -> dict[int, str]:
    """Return the class names of ``labels.csv`` by index; none for None. Raises StartError."""
    return labels_csv.read(path)
