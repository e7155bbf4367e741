"""Reads boxes from detectors that do not end in a DetectionOutput, as ``custom_values.head`` describes them.

Such a net lays grids over its input. For each cell and each anchor of a grid it gives the score of each class, and how
to move and stretch the anchor into a box.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from evaluator.options import Options
from evaluator.runtime.engine import Array
from evaluator.runtime.net import Net

NMS_THRESHOLD = 0.4
"""Non-maximum suppression drops the lower-scored of two boxes of one class with a larger IoU than this."""
CANDIDATES = 1000
"""How many boxes of an image, those with the highest scores, enter the suppression; this bounds the work."""

# Of fewer scores all can be candidates.
_MANY_SCORES = 1 << 18
# exp of more makes any anchor larger than any input.
_MAX_STRETCH = 10.0
# py-faster-rcnn's generate_anchors centres the first cell's anchors in a window of 16 pixels, whatever the stride.
_FASTER_RCNN_CENTRE = 8.0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """``rows`` x ``columns`` cells, ``stride`` input pixels apart, and the (width, height) of their anchors."""

    stride: int
    rows: int
    columns: int
    anchors: Sequence[tuple[float, float]]

    @property
    def count(self) -> int:
        """The number of all its anchors."""
        return self.rows * self.columns * len(self.anchors)

    def priors(self, centre: float) -> Floats:
        """Return its anchors, by row, column and anchor, as (n, 5): centre, size and stride, in pixels of the input.

        ``centre`` is the centre of the first cell's anchors, in x and y.
        """
        y, x = np.mgrid[: self.rows, : self.columns] * float(self.stride) + centre
        centres = np.repeat(np.stack([x.ravel(), y.ravel()], axis=1), len(self.anchors), axis=0)
        sizes = np.tile(np.array(self.anchors, np.float64), (self.rows * self.columns, 1))
        return np.hstack([centres, sizes, np.full((len(sizes), 1), float(self.stride))])


@dataclass(frozen=True)
class Head:
    """Reads boxes from a net's outputs. Safe in several threads."""

    outputs: Sequence[str]
    """The names of the outputs that it reads."""
    split: Callable[[Sequence[Array]], tuple[Array, Array]]
    """One image's outputs → the scores (n, classes) and the moves (n, 4) of all anchors, in the order of the priors."""
    decode: Callable[[Floats, Floats], tuple[Floats, Floats]]
    """Moves (n, 4) and their priors (n, 5) → centres and sizes of boxes, (n, 2) each, in pixels of the input."""
    priors: Floats
    size: tuple[int, int]
    """The width and height of the input."""
    nms_threshold: float
    first_class: int
    """The class of the first column of scores: 1 if the net has a background, which has no column."""

    def rows(self, outputs: Mapping[str, Array], index: int, threshold: float) -> Floats:
        """Return the boxes of a batch's image ``index`` with a score of at least ``threshold``, as (n, 6).

        A row is class, score, and left, top, right and bottom as shares of the net's input; a box may reach outside.
        Values that are not finite stay in, so that the caller reports the net's failure.
        """
        scores, moves = self.split([outputs[name][index] for name in self.outputs])
        prior, column = _candidates(scores, threshold)
        score = scores[prior, column]
        if len(score) > CANDIDATES:
            surest = _best(score, threshold)
            prior, column, score = prior[surest], column[surest], score[surest]
        centre, extent = self.decode(moves[prior].astype(np.float64), self.priors[prior])
        corners = np.hstack([centre - extent / 2, centre + extent / 2]) / np.tile(self.size, 2)
        rows = np.column_stack([column + self.first_class, score, corners])
        return self._suppressed(rows) if np.isfinite(rows).all() else rows

    def _suppressed(self, rows: Floats) -> Floats:
        """Drop rows that overlap with a higher-scored row of the same class."""
        kept = [rows[:0]]
        for label in np.unique(rows[:, 0]):
            of_class = rows[rows[:, 0] == label]
            # Left, top, width and height; the overlap does not depend on their unit.
            boxes = np.hstack([of_class[:, 2:4], of_class[:, 4:] - of_class[:, 2:4]])
            indices = cv2.dnn.NMSBoxes(boxes.tolist(), of_class[:, 1].tolist(), 0.0, self.nms_threshold)
            kept.append(of_class[np.array(indices, np.int64)])
        return np.concatenate(kept)


def read(head: Options, net: Net, size: tuple[int, int]) -> Head:
    """Return the head that ``custom_values.head`` describes, for a net whose input has that width and height.

    Raises StartError if it is malformed or does not fit the net's outputs.
    """
    kinds = {"yolo": _yolo, "retinaface": _retinaface, "ssd": _ssd}
    return kinds[head.choice("kind", list(kinds))](head, net, size)


def _yolo(head: Options, net: Net, size: tuple[int, int]) -> Head:
    """Read a YOLO head: per grid one output, (anchors x (4 moves, objectness, classes), rows, columns).

    The net applies no sigmoid.
    """
    head.only("kind", "levels", "nms_threshold")
    levels, grids = _grids(head, size, "output")
    numbers = _per_anchor(levels, grids, "output", net, 4 + 1 + 1)

    def split(outputs: Sequence[Array]) -> tuple[Array, Array]:
        each = np.concatenate([_last(output.reshape(-1, numbers, *output.shape[1:])) for output in outputs])
        return _sigmoid(each[:, 4:5]) * _sigmoid(each[:, 5:]), each[:, :4]

    return Head(
        outputs=[level.choice("output", net.outputs) for level in levels],
        split=split,
        decode=_decode_yolo,
        priors=np.concatenate([grid.priors(grid.stride / 2) for grid in grids]),
        size=size,
        nms_threshold=head.share("nms_threshold", NMS_THRESHOLD),
        first_class=0,
    )


def _retinaface(head: Options, net: Net, size: tuple[int, int]) -> Head:
    """Read a RetinaFace head: per grid, scores after a softmax, (classes x anchors, rows, columns), and boxes,
    (anchors x 4, rows, columns).

    Source: the first RetinaFace, on MXNet (Deng and others, 2019), with the anchors of Faster R-CNN.
    """
    head.only("kind", "levels", "nms_threshold")
    levels, grids = _grids(head, size, "scores", "boxes")
    classes = _per_anchor(levels, grids, "scores", net, 2)
    _per_anchor(levels, grids, "boxes", net, 4, 4)

    def split(outputs: Sequence[Array]) -> tuple[Array, Array]:
        scores = [_last(each.reshape(classes, -1, *each.shape[1:]).swapaxes(0, 1)) for each in outputs[::2]]
        boxes = [_last(each.reshape(-1, 4, *each.shape[1:])) for each in outputs[1::2]]
        return np.concatenate(scores)[:, 1:], np.concatenate(boxes)

    return Head(
        outputs=[level.choice(key, net.outputs) for level in levels for key in ("scores", "boxes")],
        split=split,
        decode=partial(_decode_ssd, variances=(1.0, 1.0)),
        priors=np.concatenate([grid.priors(_FASTER_RCNN_CENTRE) for grid in grids]),
        size=size,
        nms_threshold=head.share("nms_threshold", NMS_THRESHOLD),
        first_class=1,
    )


def _ssd(head: Options, net: Net, size: tuple[int, int]) -> Head:
    """Read an SSD head: scores after a softmax, (anchors, classes), and boxes, (anchors, 4), of all grids together."""
    head.only("kind", "levels", "scores", "boxes", "variances", "nms_threshold")
    grids = _grids(head, size)[1]
    anchors = sum(grid.count for grid in grids)
    names = [head.choice(key, net.outputs) for key in ("scores", "boxes")]
    scores, boxes = (net.output_shape(name) for name in names)
    if len(scores) != 2 or scores[0] != anchors or (scores[1] or 0) < 2:
        raise head.wrong("scores", f"an output of shape ({anchors}, classes), the background among them, not {scores}")
    if boxes != (anchors, 4):
        raise head.wrong("boxes", f"an output of shape ({anchors}, 4), not {boxes}")
    variances = head.numbers("variances") or [0.1, 0.2]
    if len(variances) != 2:
        raise head.wrong("variances", "two numbers, of the centre and of the size")
    return Head(
        outputs=names,
        split=lambda outputs: (outputs[0][:, 1:], outputs[1]),
        decode=partial(_decode_ssd, variances=(variances[0], variances[1])),
        priors=np.concatenate([grid.priors(grid.stride / 2) for grid in grids]),
        size=size,
        nms_threshold=head.share("nms_threshold", NMS_THRESHOLD),
        first_class=1,
    )


def _grids(head: Options, size: tuple[int, int], *outputs: str) -> tuple[list[Options], list[Grid]]:
    """Return the levels of a head, which may have fields named ``outputs``, and the grid of each."""
    levels = head.objects("levels")
    grids = []
    for level in levels:
        level.only("stride", "anchors", *outputs)
        stride = level.positive_int("stride")
        columns, rows = (-(-side // stride) for side in size)
        grids.append(Grid(stride, rows, columns, level.sizes("anchors")))
    return levels, grids


def _per_anchor(
    levels: Sequence[Options], grids: Sequence[Grid], key: str, net: Net, least: int, exactly: int | None = None
) -> int:
    """Return how many values each level's output has per anchor. Raises StartError if the levels differ."""
    numbers = exactly or 0
    for level, grid in zip(levels, grids, strict=True):
        shape, anchors = net.output_shape(level.choice(key, net.outputs)), len(grid.anchors)
        numbers = numbers or max(((shape or (0,))[0] or 0) // anchors, least)
        expected = (numbers * anchors, grid.rows, grid.columns)
        if shape != expected:
            raise level.wrong(key, f"an output of shape {expected}, not {shape}")
    return numbers


def _candidates(scores: Array, threshold: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows and columns of scores (anchors, classes) from ``threshold`` on: all, or at least the best.

    The best are those of the anchors whose best class is the best, so a low threshold costs no more than a high one.
    """
    if scores.size <= _MANY_SCORES:
        row, column = np.nonzero(~(scores < threshold))
        return row, column
    likely = _best(scores.max(axis=1), threshold)
    row, column = np.nonzero(~(scores[likely] < threshold))
    return likely[row], column


def _best(scores: Array, threshold: float) -> NDArray[np.int64]:
    """Return the places of the highest scores from ``threshold`` on, at most CANDIDATES; NaN counts as the highest."""
    places = np.flatnonzero(~(scores < threshold))
    if len(places) <= CANDIDATES:
        return places
    return places[np.argpartition(scores[places], -CANDIDATES)[-CANDIDATES:]]


def _last(numbers: Array) -> Array:
    """(anchors, numbers, rows, columns) → (rows x columns x anchors, numbers)."""
    return numbers.transpose(2, 3, 0, 1).reshape(-1, numbers.shape[1])


def _decode_yolo(moves: Floats, priors: Floats) -> tuple[Floats, Floats]:
    """Put the centre sigmoid(move) into its cell, and scale the anchor's size by exp(move).

    Source: Redmon and Farhadi, YOLOv3, 2018, section 2.1.
    """
    return priors[:, :2] + (_sigmoid(moves[:, :2]) - 0.5) * priors[:, 4:], priors[:, 2:4] * _exp(moves[:, 2:])


def _decode_ssd(moves: Floats, priors: Floats, variances: tuple[float, float]) -> tuple[Floats, Floats]:
    """Move the centre by a share of the anchor's size, and scale the size by exp(move).

    Source: CENTER_SIZE in Caffe's DetectionOutput; with variances of 1, Faster R-CNN (Ren and others, 2015), 3.1.2.
    """
    sizes = priors[:, 2:4]
    return priors[:, :2] + moves[:, :2] * variances[0] * sizes, sizes * _exp(moves[:, 2:] * variances[1])


def _exp(moves: Floats) -> Floats:
    return np.exp(np.minimum(moves, _MAX_STRETCH))


def _sigmoid(numbers: NDArray[Any]) -> NDArray[Any]:
    # exp may overflow to infinity; its inverse is 0, as it should be.
    with np.errstate(over="ignore"):
        result: NDArray[Any] = 1 / (1 + np.exp(-numbers))
    return result
