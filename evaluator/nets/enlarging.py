"""Enlarges a net's score maps to the size of an image, in blocks of rows, and finds each pixel's likeliest class."""

from __future__ import annotations

import math
from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

from evaluator.nets.effort import Effort
from evaluator.runtime.engine import Array

Labels = NDArray[np.uint16]

# So much fits the cache of a CPU, which is several times faster than memory.
_BLOCK_PIXELS = 1 << 18
_BLOCK_SCORES = 1 << 19
# If classes compete for a larger part of the pixels, comparing all pixels is faster than picking them.
_MOST_PICKED = 0.25


def row_blocks(height: int, width: int) -> Iterator[slice]:
    """Yield the rows of an image as blocks that fit a CPU's cache."""
    step = max(_BLOCK_PIXELS // width, 1)
    return (slice(start, min(start + step, height)) for start in range(0, height, step))


def likeliest(scores: Array, size: tuple[int, int], effort: Effort) -> Iterator[tuple[Labels, Array]]:
    """Yield the likeliest class of each pixel of an image, and its score, as blocks of rows from top to bottom.

    ``scores`` is (classes, h, w) float32, ``size`` the image's (width, height). This interpolates scores, not classes,
    and skips a class that is nowhere the likeliest in ``scores``. Of equal scores the first class wins.
    """
    present = np.flatnonzero(np.bincount(scores.argmax(axis=0).ravel()))
    return _Enlargement(scores, present, size, effort).blocks()


class _Enlargement:
    """A bilinear interpolation, first along the rows.

    Between two rows of scores each score changes linearly. A class that is the likeliest in both is so all the way
    between them, which spares most pixels the comparison of classes.
    """

    def __init__(self, scores: Array, present: NDArray[np.int64], size: tuple[int, int], effort: Effort) -> None:
        self._scores, self._present, self._effort = scores, present, effort
        self._width, self._height = size
        rows = scores.shape[1]
        place = (np.arange(self._height) + 0.5) * (rows / self._height) - 0.5
        above = np.floor(place).astype(np.int64)
        self._above, self._below = np.clip(above, 0, rows - 1), np.clip(above + 1, 0, rows - 1)
        self._share = (place - above).astype(np.float32)[:, np.newaxis]

    def blocks(self) -> Iterator[tuple[Labels, Array]]:
        step = self._step()
        for start in range(0, self._height, step):
            yield self._block(slice(start, start + step))

    def _step(self) -> int:
        """Return how many rows a block has: several for each row of scores, which would else be enlarged again."""
        upscale: float = self._height / self._scores.shape[1]
        most = _BLOCK_PIXELS // self._width
        wanted = _BLOCK_SCORES * max(upscale, 0.5) / (len(self._present) * self._width)
        return max(min(int(wanted), most), min(math.ceil(upscale), most), 1)

    def _block(self, rows: slice) -> tuple[Labels, Array]:
        needed, index = np.unique(np.stack([self._above[rows], self._below[rows]]), return_inverse=True)
        above, below = index.reshape(2, -1)
        self._effort.spend(len(self._present) * len(needed) * self._width)
        scores, share = self._wide(needed), self._share[rows]
        first, best = _most(iter(scores))
        labels, score = first[above], _between(best[above], best[below], share)
        contested = labels != first[below]
        if count := int(np.count_nonzero(contested)):
            picks = count <= _MOST_PICKED * contested.size
            self._effort.spend(len(scores) * (count if picks else contested.size))
            if picks:
                y, x = np.nonzero(contested)
                upper, lower, part = above[y] * self._width + x, below[y] * self._width + x, share[y, 0]
                flat = scores.reshape(len(scores), -1)
                found, best = _most(_between(each.take(upper), each.take(lower), part) for each in flat)
                labels[y, x], score[y, x] = found, best
            else:
                labels, score = _most(_between(each[above], each[below], share) for each in scores)
        return self._present.astype(np.uint16)[labels], score

    def _wide(self, rows: NDArray[np.int64]) -> Array:
        """Return these rows of the scores of all present classes, as wide as the image."""
        picked = self._scores[self._present[:, np.newaxis], rows]
        lines = picked.reshape(-1, picked.shape[-1])
        wide = cv2.resize(lines, (self._width, len(lines)), interpolation=cv2.INTER_LINEAR).astype(
            np.float32, copy=False
        )
        return wide.reshape(*picked.shape[:2], self._width)


def _between(upper: Array, lower: Array, share: Array) -> Array:
    result: Array = upper * (1 - share) + lower * share
    return result


def _most(scores: Iterator[Array]) -> tuple[Labels, Array]:
    """Return where the first largest of some scores stands, and that score. Arrays of one shape; float32."""
    best = next(scores).copy()
    first = np.zeros(best.shape, np.uint16)
    for number, each in enumerate(scores, 1):
        np.copyto(first, number, where=each > best)
        np.maximum(best, each, out=best)
    return first, best
