"""``segment``: the class of each pixel, for nets that give score maps, (n, classes, h, w), or label maps.

Result: ``{"mask": a PNG as a data URI, "detections": [{"index", "class", "color", "pts", "score"}, ...]}``. The mask
has the image's size, and each pixel the colour of its class. ``detections`` are the connected regions of all classes
but the background, the most certain first: ``color`` is [red, green, blue], ``pts`` the outline [x, y] in pixels of the
upright image, ``score`` the mean over the region. At most 1000 regions are listed, the largest.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from atserving.errors import InvalidArgument, StartError
from evaluator.images.decoding import Pixels
from evaluator.net_config import NetConfig
from evaluator.net_contract import Req, Ret
from evaluator.nets import image_input
from evaluator.nets.effort import Effort
from evaluator.nets.enlarging import Labels, likeliest, row_blocks
from evaluator.nets.image_input import ImageNet
from evaluator.nets.label_map import LabelMap, Regions
from evaluator.nets.outlines import outlines
from evaluator.nets.palette import palette
from evaluator.runtime.engine import Array

_MAX_REGIONS = 1000
_MAX_CLASSES = 1 << 16

# Rows resemble the rows above them.
_SMALL_PNG = (cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP)

_Block = tuple[Labels, Array | None]
"""Some rows of an image: the classes of the pixels, and their scores if the net gives scores."""


@dataclass(frozen=True)
class Input:
    """A prepared request. ``pixels`` is (height, width, channels) uint8, ``size`` the image's (width, height)."""

    pixels: Pixels
    size: tuple[int, int]


class Segment(ImageNet):
    """A segmenter."""

    name = "segment"

    def __init__(self, config: NetConfig) -> None:
        """Raises StartError if the release can't be served as a segmenter."""
        super().__init__(config)
        self._output = self.output("scores or labels")
        # A label map may lack the axis of classes.
        if len(self.net.output_shape(self._output)) not in (2, 3):
            raise StartError(f"segment takes nets that give a map of classes; {self._output!r} is none")
        self._background = config.custom_values.integer("background", 0)
        if not -1 <= self._background < _MAX_CLASSES:
            raise StartError(
                f"custom_values.background is {self._background}, should be the index of a class, or -1 for none"
            )
        self._colors = palette(config.custom_values.fields.get("colors"))

    def preprocess(self, req: Req) -> Input:
        image_input.params(req)
        return Input(*self.image(req))

    def infer(self, reqid: str, reqs: Sequence[Input]) -> list[Ret]:
        maps = self.net.run({self.net.inputs[0]: np.stack([req.pixels for req in reqs])}, [self._output])[self._output]
        if maps.shape[0] != len(reqs) or not maps.size:
            return [{"code": 500, "message": f"the net's output is {maps.shape}, not one map an image"}] * len(reqs)
        return [self._ret(each, req.size) for each, req in zip(maps, reqs, strict=True)]

    def _ret(self, given: Array, size: tuple[int, int]) -> Ret:
        if not np.isfinite(given).all():
            return {"code": 500, "message": "the net's output is not finite"}
        if given.ndim == 2 or given.shape[0] == 1:
            given = np.rint(given.reshape(given.shape[-2:]))
            if given.min() < 0 or given.max() >= _MAX_CLASSES:
                return {"code": 500, "message": "the net's output is no map of labels"}
        try:
            return {"code": 0, "message": "", "result": self._result(given, size, Effort())}
        except InvalidArgument as error:
            return {"code": error.code, "message": error.message}

    def _result(self, given: Array, size: tuple[int, int], effort: Effort) -> dict[str, Any]:
        labels = LabelMap(size[0], self._background, effort)
        for block in self._whole(given, size, effort):
            labels.add(*block)
        encoded = cv2.imencode(".png", labels.paint(self._colors[:, ::-1]), _SMALL_PNG)[1]
        mask = "data:image/png;base64," + base64.b64encode(encoded.tobytes()).decode()
        return {"mask": mask, "detections": self._detections(labels.largest(_MAX_REGIONS), effort)}

    def _box(self, size: tuple[int, int]) -> tuple[slice, slice]:
        """Return the part of an image that the net sees, as rows and columns."""
        left, top, right, bottom = np.rint(np.array(self.geometry.window) * np.tile(size, 2)).astype(int)
        return slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1))

    def _whole(self, given: Array, size: tuple[int, int], effort: Effort) -> Iterator[_Block]:
        """Yield the classes of an image's pixels, and their scores, as blocks of rows.

        ``given`` is what the net says about the part that it sees: labels (h, w) or scores (classes, h, w). The rest is
        background.
        """
        rows, columns = self._box(size)
        seen = (columns.stop - columns.start, rows.stop - rows.start)
        if given.ndim == 2:
            blocks = _enlarged(given.astype(np.uint16), seen)
        else:
            blocks = likeliest(probabilities(given), seen, effort)
        sides = ((0, 0), (columns.start, size[0] - columns.stop))
        yield from self._margin(rows.start, size[0], given.ndim > 2)
        for labels, scores in blocks:
            if any(sides[1]):
                labels = np.pad(labels, sides, constant_values=max(self._background, 0))
                scores = None if scores is None else np.pad(scores, sides)
            yield labels, scores
        yield from self._margin(size[1] - rows.stop, size[0], given.ndim > 2)

    def _margin(self, height: int, width: int, scored: bool) -> Iterator[_Block]:
        """Yield rows that the net does not see."""
        for rows in row_blocks(height, width):
            labels = np.full((rows.stop - rows.start, width), max(self._background, 0), np.uint16)
            yield labels, np.zeros(labels.shape, np.float32) if scored else None

    def _detections(self, regions: Regions, effort: Effort) -> list[dict[str, Any]]:
        pts = outlines(regions, effort)
        indices, scores = regions.indices.tolist(), regions.scores.tolist()
        return [
            {
                "index": indices[each],
                "class": self.class_name(indices[each]),
                "color": self._colors[indices[each] % len(self._colors)].tolist(),
                "pts": pts[each],
                "score": scores[each],
            }
            for each in np.argsort(-regions.scores, kind="stable").tolist()
        ]


def _enlarged(labels: Labels, size: tuple[int, int]) -> Iterator[_Block]:
    whole = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST).astype(np.uint16, copy=False)
    return ((whole[rows], None) for rows in row_blocks(size[1], size[0]))


def probabilities(scores: Array) -> Array:
    """Return scores (classes, h, w) unchanged if they add up to 1, else their softmax over the classes."""
    if scores.min() >= 0 and np.allclose(scores.sum(axis=0), 1, atol=1e-3):
        return scores
    powers = np.exp(scores - scores.max(axis=0))
    result: Array = powers / powers.sum(axis=0)
    return result
