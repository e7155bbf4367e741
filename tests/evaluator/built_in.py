"""Loads built-in nets in the test process, with releases or outputs that a test makes."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from atserving.errors import StartError
from evaluator import nets
from evaluator.net_config import NetConfig
from evaluator.net_contract import LoadedNet, Ret
from evaluator.nets.image_input import ImageNet
from evaluator.options import Options
from tests.caffe.nets import input_layer, layer, write_net

Array = NDArray[Any]


def config(files: Mapping[str, Path], **fields: Any) -> NetConfig:
    """Return the config of a net. Fields unknown to a config go into ``custom_values``."""
    known = {name: fields.pop(name) for name in ("image_width", "batch_size", "use_device") if name in fields}
    params = Options("model_params", fields.pop("model_params", {}))
    return NetConfig(files, custom_values=Options("custom_values", fields), model_params=params, **known)


def files(
    folder: Path, prototxt: str, weights: Mapping[str, Sequence[Array]] | None = None, labels: str = ""
) -> dict[str, Path]:
    """Write a release's files; without weights, draw them from a seed."""
    paths = {path.name: path for path in write_net(folder, prototxt, weights)}
    if labels:
        paths["labels.csv"] = folder / "labels.csv"
        paths["labels.csv"].write_text(labels)
    return paths


def loaded(net: str, config: NetConfig) -> ImageNet:
    """Load a built-in net by its name."""
    built_in = nets.built_in(net)(config)
    assert isinstance(built_in, ImageNet)
    return built_in


def start_error(net: str, config: NetConfig) -> str:
    """Return the message with which a built-in net refuses to load."""
    with pytest.raises(StartError) as caught:
        nets.built_in(net)(config)
    return str(caught.value)


def evaluate(net: LoadedNet, *requests: tuple[Array, Any]) -> list[Ret]:
    """Return the rets of a batch of images, (height, width, 3) BGR, each with its params."""
    reqs = [net.preprocess({"data": {"uri": "", "body": png(image)}, "params": params}) for image, params in requests]
    return net.infer("r", reqs)


class FixedOutputs:
    """A stand-in for a net, with the same outputs for any input."""

    inputs = ("data",)

    def __init__(self, outputs: Mapping[str, Array]) -> None:
        self._outputs = {name: np.asarray(array, np.float32) for name, array in outputs.items()}

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        return {name: self._outputs[name] for name in outputs or self._outputs}


_TINY = {
    "classify": (layer("Flatten"), {}),
    "detect": (
        layer("Convolution", "data", "out", "convolution_param { num_output: 6 kernel_size: 1 }"),
        {"head": {"kind": "yolo", "levels": [{"output": "out", "stride": 1, "anchors": [[1, 1]]}]}},
    ),
    "feature": (layer("Flatten"), {}),
    "segment": (layer("Sigmoid"), {}),
}


@functools.cache
def _tiny(net: str, labels: str) -> ImageNet:
    layers, custom_values = _TINY[net]
    with tempfile.TemporaryDirectory() as folder:
        release = files(Path(folder), input_layer(1, 3, 2, 2) + layers, labels=labels)
        return loaded(net, config(release, **custom_values))


def with_outputs(net: str, outputs: Mapping[str, Array], labels: str = "", **attributes: Any) -> ImageNet:
    """Return a built-in net whose graph gives these outputs; ``out`` is the graph's own output.

    ``attributes`` replace those of the net.
    """
    built_in = copy.copy(_tiny(net, labels))
    for name, value in {"net": FixedOutputs(outputs), **attributes}.items():
        assert hasattr(built_in, name)
        setattr(built_in, name, value)
    return built_in


def png(image: Array) -> bytes:
    return cv2.imencode(".png", image.astype(np.uint8))[1].tobytes()
