"""Boxes in numpy: priors, their matching and coding, suppression, average precision.

Boxes are (n, 4) as x1, y1, x2, y2. Priors, coding and suppression follow SSD, https://arxiv.org/abs/1512.02325, and the
layers PriorBox and DetectionOutput of its Caffe branch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from examples.caffe_files import Array

Indices = NDArray[np.int64]

VARIANCE = np.array([0.1, 0.1, 0.2, 0.2], np.float32)
NMS_THRESHOLD = 0.45
TOP_K = 100  # candidates a class
KEEP_TOP_K = 50  # rows an image
CONFIDENCE = 0.01  # rows have a higher score


@dataclass(frozen=True)
class PriorLayer:
    """A PriorBox layer. Each cell has a square of min_size, one of the mean size, and a box of the ratio."""

    cells: int
    min_size: float
    max_size: float
    ratio: float = 0.65


PRIOR_LAYERS = (PriorLayer(16, 22, 30), PriorLayer(8, 38, 56))
PRIORS_A_CELL = 3


def priors(image_size: int) -> Array:
    """Return all priors as fractions of the image, in the order of the net's rows: by layer, row, column, kind."""
    boxes = []
    for layer in PRIOR_LAYERS:
        middle = np.sqrt(layer.min_size * layer.max_size)
        stretch = np.sqrt(layer.ratio)
        sizes = [
            (layer.min_size, layer.min_size),
            (middle, middle),
            (layer.min_size * stretch, layer.min_size / stretch),
        ]
        step = image_size / layer.cells
        for row, column in np.ndindex(layer.cells, layer.cells):
            x, y = (column + 0.5) * step, (row + 0.5) * step
            boxes += [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for w, h in sizes]
    return np.array(boxes, np.float32) / np.float32(image_size)


def overlaps(first: Array, second: Array) -> Array:
    """Return the intersection over union of each pair, (n, m)."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (first, second)]
    return np.asarray(both / (areas[0][:, None] + areas[1][None, :] - both), np.float32)


def match(prior_boxes: Array, boxes: Array) -> Indices:
    """Return for each prior the index of its box, or -1.

    A box goes to its best prior, and to all priors with an overlap of at least 0.5.
    """
    if not len(boxes):
        return np.full(len(prior_boxes), -1, np.int64)
    overlap = overlaps(prior_boxes, boxes)
    matched = np.where(overlap.max(axis=1) >= 0.5, overlap.argmax(axis=1), -1)
    matched[overlap.argmax(axis=0)] = np.arange(len(boxes))
    return matched.astype(np.int64)


def encode(prior_boxes: Array, boxes: Array) -> Array:
    """Return the locations (n, 4) for `decode` to turn priors (n, 4) into boxes (n, 4)."""
    size, box_size = prior_boxes[:, 2:] - prior_boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = (boxes[:, :2] + boxes[:, 2:] - prior_boxes[:, :2] - prior_boxes[:, 2:]) / 2 / size
    return np.asarray(np.hstack([shift, np.log(box_size / size)]) / VARIANCE, np.float32)


def decode(prior_boxes: Array, locations: Array) -> Array:
    """Return the boxes (n, 4) for priors and locations; reverses `encode`."""
    size = prior_boxes[:, 2:] - prior_boxes[:, :2]
    middle = (prior_boxes[:, :2] + prior_boxes[:, 2:]) / 2 + locations[:, :2] * VARIANCE[:2] * size
    half = np.exp(locations[:, 2:] * VARIANCE[2:]) * size / 2
    return np.hstack([middle - half, middle + half]).astype(np.float32)


def detections(prior_boxes: Array, locations: Array, probabilities: Array) -> Array:
    """Return DetectionOutput's rows (label, score, box) for one image, by label and then by falling score."""
    boxes = decode(prior_boxes, locations)
    rows = []
    for label in range(1, probabilities.shape[1]):
        scores = probabilities[:, label]
        order = [index for index in np.argsort(-scores, kind="stable")[:TOP_K] if scores[index] > CONFIDENCE]
        kept: list[int] = []
        for index in order:
            if not kept or overlaps(boxes[[index]], boxes[kept]).max() <= NMS_THRESHOLD:
                kept.append(index)
        rows += [(label, scores[index], *boxes[index]) for index in kept]
    table = np.array(rows, np.float32).reshape(-1, 6)
    best = np.sort(np.argsort(-table[:, 1], kind="stable")[:KEEP_TOP_K])
    return table[best]


def average_precision(found: Sequence[Array], truth: Sequence[Array]) -> float:
    """Return the area under precision over recall for one class.

    Args:
        found: for each image rows (score, box).
        truth: for each image its boxes. The best row with an overlap of at least 0.5 finds a box; other rows are wrong.
    """
    hits: list[tuple[float, bool]] = []
    for rows, boxes in zip(found, truth, strict=True):
        taken = np.zeros(len(boxes), bool)
        for row in rows[np.argsort(-rows[:, 0], kind="stable")]:
            overlap = overlaps(row[None, 1:], boxes)[0]
            best = int(overlap.argmax()) if len(boxes) else -1
            right = best >= 0 and overlap[best] >= 0.5 and not taken[best]
            if right:
                taken[best] = True
            hits.append((float(row[0]), bool(right)))
    hits.sort(key=lambda hit: -hit[0])
    right_so_far = np.cumsum([right for _, right in hits])
    precision = right_so_far / np.arange(1, len(hits) + 1)
    recall = right_so_far / sum(map(len, truth))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0) * envelope).sum())
