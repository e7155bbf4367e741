"""A plain reading of ``segment``'s contract: each class on its own, over the whole image. Slow, for comparison."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from tests.evaluator.built_in import Array


def likeliest(scores: Array, size: tuple[int, int]) -> tuple[Array, Array]:
    """Return the class of each pixel and its score: of (classes, h, w), for an image of that width and height."""
    labels, best = np.zeros(size[::-1], np.uint16), np.zeros(size[::-1], np.float32)
    for index in np.unique(scores.argmax(axis=0)).tolist():
        score = cv2.resize(scores[index], size, interpolation=cv2.INTER_LINEAR)
        np.copyto(labels, index, where=score > best)
        np.maximum(best, score, out=best)
    return labels, best


def regions(labels: Array, scores: Array | None, background: int, most: int) -> list[tuple[int, int, float, Any]]:
    """Return the class, area, score and outline of the largest regions, in the order of ``segment``."""
    found = []
    for index in np.unique(labels).tolist():
        if index != background:
            found += _of_class(index, (labels == index).view(np.uint8), scores)
    return sorted(sorted(found, key=lambda region: -region[1])[:most], key=lambda region: -region[2])


def _of_class(index: int, of_class: Array, scores: Array | None) -> list[tuple[int, int, float, Any]]:
    numbered = cv2.connectedComponents(of_class, connectivity=8)[1]
    borders, levels = cv2.findContours(of_class, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    found = []
    for border, level in zip(borders, levels[0], strict=True):
        if level[3] < 0:
            x, y = border[0, 0]
            inside = numbered == numbered[y, x]
            score = 1.0 if scores is None else float(min(scores[inside].mean(dtype=np.float64), 1.0))
            found.append((index, int(inside.sum()), score, border.reshape(-1, 2).tolist()))
    return found
