"""``segment``: the class of each pixel, for nets that give score maps, (n, classes, h, w), or label maps.

Result: ``{"mask": a PNG as a data URI, "detections": [{"index", "class", "color", "pts", "score"}, ...]}``. The mask
has the image's size, and each pixel the colour of its class. ``detections`` are the connected regions of all classes
but the background, the most certain first: ``color`` is [red, green, blue], ``pts`` the outline [x, y] in pixels of the
upright image, ``score`` the mean over the region. At most 1000 regions are listed, the largest.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from atserving.errors import StartError
from evaluator.images.decoding import Pixels
from evaluator.net_config import NetConfig
from evaluator.net_contract import Req, Ret
from evaluator.nets import image_input
from evaluator.nets.image_input import ImageNet
from evaluator.nets.palette import palette
from evaluator.runtime.engine import Array

_MAX_REGIONS = 1000
_MAX_CLASSES = 1 << 16

Labels = NDArray[np.uint16]


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
            numbers = np.rint(given.reshape(given.shape[-2:]))
            if numbers.min() < 0 or numbers.max() >= _MAX_CLASSES:
                return {"code": 500, "message": "the net's output is no map of labels"}
            labels, scores = self._whole_labels(numbers.astype(np.uint16), size), None
        else:
            labels, scores = self._from_scores(probabilities(given), size)
        encoded = cv2.imencode(".png", self._colors[:, ::-1][labels % len(self._colors)])[1]
        mask = "data:image/png;base64," + base64.b64encode(encoded.tobytes()).decode()
        return {"code": 0, "message": "", "result": {"mask": mask, "detections": self._detections(labels, scores)}}

    def _box(self, size: tuple[int, int]) -> tuple[slice, slice]:
        """Return the part of an image that the net sees, as rows and columns."""
        left, top, right, bottom = np.rint(np.array(self.geometry.window) * np.tile(size, 2)).astype(int)
        return slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1))

    def _whole_labels(self, seen: Labels, size: tuple[int, int]) -> Labels:
        """Enlarge the labels (h, w) of what the net sees to the whole image; the rest is background."""
        whole = np.full((size[1], size[0]), max(self._background, 0), np.uint16)
        part = whole[self._box(size)]
        part[...] = cv2.resize(seen, (part.shape[1], part.shape[0]), interpolation=cv2.INTER_NEAREST)
        return whole

    def _from_scores(self, scores: Array, size: tuple[int, int]) -> tuple[Labels, Array]:
        """Return the likeliest class of each pixel of the image, and its score. Interpolates scores, not classes.

        Skips a class that is nowhere the likeliest in the net's output, which bounds time and memory.
        """
        labels = np.full((size[1], size[0]), max(self._background, 0), np.uint16)
        best = np.zeros((size[1], size[0]), np.float32)
        box = self._box(size)
        part, part_best = labels[box], best[box]
        for index in np.unique(scores.argmax(axis=0)).tolist():
            score = cv2.resize(scores[index], (part.shape[1], part.shape[0]), interpolation=cv2.INTER_LINEAR)
            np.copyto(part, index, where=score > part_best)
            np.maximum(part_best, score, out=part_best)
        return labels, best

    def _detections(self, labels: Labels, scores: Array | None) -> list[dict[str, Any]]:
        regions: list[tuple[int, dict[str, Any]]] = []
        for index in np.unique(labels).tolist():
            if index != self._background:
                regions += self._regions(index, (labels == index).view(np.uint8), scores)
        largest = sorted(regions, key=lambda region: -region[0])[:_MAX_REGIONS]
        return sorted((detection for _, detection in largest), key=lambda detection: -detection["score"])

    def _regions(
        self, index: int, of_class: NDArray[np.uint8], scores: Array | None
    ) -> list[tuple[int, dict[str, Any]]]:
        """Return the area in pixels and the detection of each region of pixels that touch, also at a corner."""
        count, numbered = cv2.connectedComponents(of_class, connectivity=8)
        # Count only the pixels of this class: all classes together then cost one pass over the image.
        inside = of_class.view(np.bool_)
        numbers = numbered[inside]
        areas = np.bincount(numbers, minlength=count)
        sums = areas if scores is None else np.bincount(numbers, weights=scores[inside], minlength=count)
        color = self._colors[index % len(self._colors)].tolist()
        found = [(int(areas[region]), region, pts) for region, pts in _outlines(of_class, numbered)]
        return [
            (
                area,
                {
                    "index": index,
                    "class": self.class_name(index),
                    "color": color,
                    "pts": pts.tolist(),
                    "score": float(min(sums[region] / area, 1.0)),
                },
            )
            for area, region, pts in sorted(found, key=lambda each: -each[0])[:_MAX_REGIONS]
        ]


def probabilities(scores: Array) -> Array:
    """Return scores (classes, h, w) unchanged if they add up to 1, else their softmax over the classes."""
    if scores.min() >= 0 and np.allclose(scores.sum(axis=0), 1, atol=1e-3):
        return scores
    powers = np.exp(scores - scores.max(axis=0))
    result: Array = powers / powers.sum(axis=0)
    return result


def _outlines(of_class: NDArray[np.uint8], numbered: NDArray[Any]) -> list[tuple[int, NDArray[Any]]]:
    """Return the number and the outline [x, y] of each region."""
    # The first level of CCOMP is the outer border of every region, also of one in the hole of another.
    borders, levels = cv2.findContours(of_class, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    outlines = []
    for border, level in zip(borders, levels[0] if borders else (), strict=True):
        if level[3] < 0:
            pts = border.reshape(-1, 2)
            outlines.append((int(numbered[pts[0][1], pts[0][0]]), pts))
    return outlines
