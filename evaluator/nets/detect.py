"""``detect``: the objects on an image and their boxes, the most certain first.

For nets that end in a DetectionOutput, and those whose head ``custom_values.head`` describes
(:mod:`evaluator.nets.heads`). Params: ``threshold``, the least score, 0 to 1 (``custom_values.threshold``, 0.5).
Result: ``{"detections": [{"pts", "index", "class", "score"}, ...]}``; ``pts`` are the corners [x, y] clockwise from top
left, in pixels of the upright image and inside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atserving.errors import InvalidArgument, StartError
from evaluator.images.decoding import Pixels
from evaluator.net_config import NetConfig
from evaluator.net_contract import Req, Ret
from evaluator.nets import heads, image_input
from evaluator.nets.heads import Head
from evaluator.nets.image_input import ImageNet
from evaluator.runtime.engine import Array

_THRESHOLD = 0.5
# A row of a DetectionOutput: the image's index in the batch, the label, the score, the corners as shares of the input.
_ROW = 7


@dataclass(frozen=True)
class Input:
    """A prepared request. ``pixels`` is (height, width, channels) uint8, ``size`` the image's (width, height)."""

    pixels: Pixels
    size: tuple[int, int]
    threshold: float


@dataclass(frozen=True)
class DetectionOutput:
    """Reads the rows of that layer, as :class:`heads.Head` reads grids."""

    name: str

    def rows(self, outputs: Mapping[str, Array], index: int, threshold: float) -> NDArray[Any]:
        """Return (n, 6): the label, the score, and left, top, right and bottom as shares of the net's input."""
        rows = outputs[self.name].reshape(-1, _ROW)
        rows = rows[rows[:, 0] == index, 1:]
        # This keeps NaN, so that the caller reports it.
        return rows[~(rows[:, 1] < threshold)]


class Detect(ImageNet):
    """A detector."""

    name = "detect"

    def __init__(self, config: NetConfig) -> None:
        """Raises StartError if the release can't be served as a detector."""
        self._threshold = config.custom_values.share("threshold", _THRESHOLD)
        super().__init__(config)
        self.head = self._read_head(config)

    def _read_head(self, config: NetConfig) -> Head | DetectionOutput:
        if "head" in config.custom_values:
            return heads.read(config.custom_values.object("head"), self.net, self.input_size)
        output = self.output("detections")
        if self.net.output_shape(output)[-1:] != (_ROW,):
            raise StartError(
                f"detect takes nets that end in a DetectionOutput; {output!r} is no such output, "
                "and there is no custom_values.head"
            )
        return DetectionOutput(output)

    def preprocess(self, req: Req) -> Input:
        threshold = image_input.params(req).get("threshold", self._threshold)
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise InvalidArgument("params.threshold should be a number from 0 to 1")
        pixels, size = self.image(req)
        return Input(pixels, size, threshold)

    def infer(self, reqid: str, reqs: Sequence[Input]) -> list[Ret]:
        outputs = self.net.run({self.net.inputs[0]: np.stack([req.pixels for req in reqs])})
        return [self._ret(self.head.rows(outputs, index, req.threshold), req.size) for index, req in enumerate(reqs)]

    def _ret(self, rows: NDArray[Any], size: tuple[int, int]) -> Ret:
        if not np.isfinite(rows).all():
            return {"code": 500, "message": "the net's output is not finite"}
        rows = rows[np.argsort(-rows[:, 1], kind="stable")]
        corners, inside = _corners(rows[:, 2:], self.geometry.window, size)
        detections = [
            self._detection(int(row[0]), float(row[1]), pts)
            for row, pts, is_inside in zip(rows, corners.tolist(), inside, strict=True)
            if is_inside
        ]
        return {"code": 0, "message": "", "result": {"detections": detections}}

    def _detection(self, index: int, score: float, corners: list[int]) -> dict[str, Any]:
        left, top, right, bottom = corners
        return {
            "pts": [[left, top], [right, top], [right, bottom], [left, bottom]],
            "index": index,
            "class": self.class_name(index),
            "score": score,
        }


def _corners(
    boxes: NDArray[Any], window: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.bool_]]]:
    """Convert boxes (n, 4), shares of the net's input, to pixels of the image, clipped to it; and mark those inside.

    ``window`` is the part of the image that the net sees: left, top, right and bottom as shares of its size.
    """
    origin, extent = np.tile(window[:2], 2), np.tile(np.subtract(window[2:], window[:2]), 2)
    cut = np.clip(origin + boxes.astype(np.float64) * extent, 0, 1)
    inside = (cut[:, 0] < cut[:, 2]) & (cut[:, 1] < cut[:, 3])
    last = np.tile(np.array(size) - 1, 2)
    return np.minimum(np.rint(cut * np.tile(size, 2)), last).astype(np.int64), inside
