"""Boxes and detections: the overlap of two boxes, and a canonical order of detections."""

from __future__ import annotations

import numpy as np

from .nets import Array


def overlap(a: Array, b: Array, extra: float) -> float:
    """Return the intersection over union of two boxes (x1, y1, x2, y2).

    Args:
        extra: added to every width and height; 1 if the boxes include their last pixel.
    """
    width = min(a[2], b[2]) - max(a[0], b[0]) + extra
    height = min(a[3], b[3]) - max(a[1], b[1]) + extra
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    areas = [(box[2] - box[0] + extra) * (box[3] - box[1] + extra) for box in (a, b)]
    return float(both / (areas[0] + areas[1] - both))


def rows(detections: Array) -> Array:
    """Sort the rows of a DetectionOutput by image, label and falling score, without OpenCV's padding of zeros."""
    table = detections.reshape(-1, 7)
    table = table[table[:, 2] > 0]
    return table[np.lexsort((-table[:, 2], table[:, 1], table[:, 0]))]
