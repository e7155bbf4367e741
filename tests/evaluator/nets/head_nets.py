"""Small nets whose boxes one can reckon: they end in grids of anchors that are sure where a colour is."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.caffe.nets import input_layer, layer
from tests.evaluator.built_in import Array

WIDTH, HEIGHT = 64, 32


def grid(stride: int, channels: int, name: str) -> str:
    """A grid over the input whose numbers are made, by a 1x1 convolution, of the mean colour of each cell."""
    pooled = f"{name}_mean"
    return layer(
        "Pooling", "data", pooled, f"pooling_param {{ pool: AVE kernel_size: {stride} stride: {stride} }}", pooled
    ) + layer("Convolution", pooled, name, f"convolution_param {{ num_output: {channels} kernel_size: 1 }}", name)


def sure_where(colour: int, channel: int, channels: int, bias: list[float]) -> list[Array]:
    """Weights of such a grid: ``channel`` grows with a colour (0 is blue), which is 0 to 255; all have a bias."""
    weights = np.zeros((channels, 3, 1, 1))
    weights[channel, colour] = 0.1
    return [weights, np.array(bias)]


def picture(*cells: tuple[int, int, int], stride: int = 16) -> Array:
    """Black, of the size of the nets' input, but for cells of a grid, each (row, column, colour)."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for row, column, colour in cells:
        image[row * stride : (row + 1) * stride, column * stride : (column + 1) * stride, colour] = 255
    return image


# Two anchors, each of x, y, width, height, objectness and two classes. The second anchor is sure where it is blue, of
# its second class; it is moved a quarter of a cell to the right, and made half as wide and twice as high.
_UNSURE = [0.0, 0, 0, 0, -20, 0, 0]
YOLO_BIAS = [*_UNSURE, np.log(3), 0, np.log(0.5), np.log(2), -10, -20, 20]
YOLO = input_layer(1, 3, HEIGHT, WIDTH) + grid(16, 14, "coarse") + grid(8, 14, "fine")
YOLO_WEIGHTS = {
    "coarse": sure_where(0, 7 + 4, 14, YOLO_BIAS),
    # The first anchor of the fine grid is sure of its first class where it is red.
    "fine": sure_where(2, 4, 14, [0, 0, 0, 0, -10, 20, -20, *_UNSURE]),
}
YOLO_HEAD: dict[str, Any] = {
    "kind": "yolo",
    "levels": [
        {"output": "coarse", "stride": 16, "anchors": [[40, 40], [16, 8]]},
        {"output": "fine", "stride": 8, "anchors": [[8, 8], [30, 30]]},
    ],
}

# The second anchor is sure where it is blue, the first where it is red. The scores of a class come together.
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
