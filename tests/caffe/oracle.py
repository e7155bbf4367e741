"""Run Caffe nets in OpenCV, as an independent oracle."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from evaluator.caffe.net_plan import plan_net
from evaluator.caffe.prototxt import parse_net

from .nets import caffemodel


class Upsample:
    """Upsample as a custom layer of OpenCV: repeat numbers, or put them at the positions that a mask gives."""

    def __init__(self, params: dict[str, Any], blobs: Any) -> None:
        self._scale = int(params.get("scale", 2))

    def getMemoryShapes(self, inputs: list[list[int]]) -> list[list[int]]:
        images, channels, height, width = inputs[0]
        return [[images, channels, height * self._scale, width * self._scale]]

    def forward(self, inputs: list[NDArray[Any]]) -> list[NDArray[Any]]:
        if len(inputs) == 1:
            return [inputs[0].repeat(self._scale, 2).repeat(self._scale, 3)]
        data, mask = inputs[0], inputs[1].astype(np.int64)
        images, channels, height, width = data.shape
        plane = np.zeros((images, channels, height * self._scale * width * self._scale), np.float32)
        np.put_along_axis(plane, mask.reshape(images, channels, -1), data.reshape(images, channels, -1), axis=2)
        return [plane.reshape(images, channels, height * self._scale, width * self._scale)]


cv2.dnn_registerLayer("Upsample", cast(Any, Upsample))


def for_opencv(prototxt: str) -> str:
    """Replace SegNet's BN, which OpenCV does not know, by an equivalent Scale layer."""
    renamed = prototxt.replace('type: "BN"', 'type: "Scale" scale_param { bias_term: true }')
    return re.sub(r"bn_param\s*\{(?:[^{}]|\{[^{}]*\})*\}", "", renamed)


def opencv_outputs(
    folder: Path,
    prototxt: str,
    weights: Mapping[str, Sequence[NDArray[Any]]],
    feeds: Mapping[str, NDArray[Any]],
    blobs: Sequence[str],
) -> dict[str, NDArray[Any]]:
    """Return the given blobs as OpenCV computes them, float32 arrays by name.

    Args:
        folder: an existing folder for the net's files.
        weights: the weights by layer name.
        feeds: the inputs by name.
    """
    plan = plan_net(parse_net(prototxt.encode(), "net"), "net")
    names = {plan.last[name]: name for name in blobs}
    # OpenCV addresses a blob by the layer that produces it.
    layers = {names[top]: layer.spec.name for layer in plan.layers for top in layer.tops if top in names}
    (folder / "oracle.prototxt").write_text(for_opencv(prototxt))
    (folder / "oracle.caffemodel").write_bytes(caffemodel(weights))
    net = cv2.dnn.readNetFromCaffe(str(folder / "oracle.prototxt"), str(folder / "oracle.caffemodel"))
    for name, array in feeds.items():
        net.setInput(array, name)
    return dict(zip(blobs, net.forward([layers[name] for name in blobs]), strict=True))
