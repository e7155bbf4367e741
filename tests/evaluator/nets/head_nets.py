"""Small nets that end in grids of anchors. Cells of one colour get a high score, so tests can calculate the boxes."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.caffe.nets import input_layer, layer
from tests.evaluator.built_in import Array

WIDTH, HEIGHT = 64, 32


def grid(stride: int, channels: int, name: str) -> str:
    """Return the layers of a grid, whose values are a 1x1 convolution of each cell's mean colour."""
    pooled = f"{name}_mean"
    return layer(
        "Pooling", "data", pooled, f"pooling_param {{ pool: AVE kernel_size: {stride} stride: {stride} }}", pooled
    ) + layer("Convolution", pooled, name, f"convolution_param {{ num_output: {channels} kernel_size: 1 }}", name)


def sensitive_to(colour: int, channel: int, channels: int, bias: list[float]) -> list[Array]:
    """Return the weights of a grid in which ``channel`` grows by 0.1 per unit of a colour, where 0 is blue."""
    weights = np.zeros((channels, 3, 1, 1))
    weights[channel, colour] = 0.1
    return [weights, np.array(bias)]


def picture(*cells: tuple[int, int, int], stride: int = 16) -> Array:
    """Return an image of the nets' input size, black but for these cells of a grid: (row, column, colour)."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for row, column, colour in cells:
        image[row * stride : (row + 1) * stride, column * stride : (column + 1) * stride, colour] = 255
    return image


# Two anchors, each with x, y, width, height, objectness and two classes. A blue cell gives the second anchor a high
# score of the second class. The net moves this anchor right by a quarter of a cell, halves its width and doubles its
# height.
_LOW_SCORED = [0.0, 0, 0, 0, -20, 0, 0]
YOLO_BIAS = [*_LOW_SCORED, np.log(3), 0, np.log(0.5), np.log(2), -10, -20, 20]
YOLO = input_layer(1, 3, HEIGHT, WIDTH) + grid(16, 14, "coarse") + grid(8, 14, "fine")
YOLO_WEIGHTS = {
    "coarse": sensitive_to(0, 7 + 4, 14, YOLO_BIAS),
    # A red cell of the fine grid gives the first anchor a high score of the first class.
    "fine": sensitive_to(2, 4, 14, [0, 0, 0, 0, -10, 20, -20, *_LOW_SCORED]),
}
YOLO_HEAD: dict[str, Any] = {
    "kind": "yolo",
    "levels": [
        {"output": "coarse", "stride": 16, "anchors": [[40, 40], [16, 8]]},
        {"output": "fine", "stride": 8, "anchors": [[8, 8], [30, 30]]},
    ],
}

# A blue cell gives the second anchor a high score, a red cell the first. The channels are ordered by class.
RETINAFACE = (
    input_layer(1, 3, HEIGHT, WIDTH)
    + grid(16, 4, "score")
    + layer("Reshape", "score", "pairs", "reshape_param { shape { dim: 2 dim: -1 dim: 0 } axis: 1 }", "pairs")
    + layer("Softmax", "pairs", "prob", name="softmax")
    + layer("Reshape", "prob", "scores", "reshape_param { shape { dim: 4 dim: -1 dim: 0 } axis: 1 }", "scores")
    + grid(16, 8, "boxes")
)
RETINAFACE_WEIGHTS = {
    "score": [
        np.array([[0, 0, 0], [0, 0, 0], [0, 0, 0.1], [0.1, 0, 0]]).reshape(4, 3, 1, 1),
        np.array([10.0, 10, 0, 0]),
    ],
    "boxes": [np.zeros((8, 3, 1, 1)), np.array([0, 0, 0, 0, 0.5, -0.25, np.log(0.5), np.log(1.5)])],
}
RETINAFACE_HEAD: dict[str, Any] = {
    "kind": "retinaface",
    "levels": [{"scores": "scores", "boxes": "boxes", "stride": 16, "anchors": [[16, 16], [8, 8]]}],
}
