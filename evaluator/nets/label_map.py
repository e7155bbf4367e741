"""A map of classes, one for each pixel, kept as runs: stretches of equal pixels in a row.

Runs of one class that touch, also at a corner, form a region. All work follows the pixels and the runs, however many
classes and regions there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atserving.errors import InvalidArgument
from evaluator.nets.effort import Effort
from evaluator.nets.enlarging import Labels
from evaluator.runtime.engine import Array

Ints = NDArray[np.int32]

MAX_RUNS = 1 << 22
"""How many runs a map may have; noise on 500 x 500 pixels has half as many if it is enlarged to 4999 x 4999."""


@dataclass(frozen=True)
class Regions:
    """Some regions of a map: the class, the area in pixels and the mean score of each."""

    indices: Labels
    areas: NDArray[np.int64]
    scores: NDArray[np.float64]
    firsts: Ints
    """The first pixel of each, counted along the rows."""
    numbers: NDArray[np.uint16]
    """For each pixel, (height, width), the place of its region in these lists, from 1 on; 0 if it is in none."""


class LabelMap:
    """Takes a map as blocks of rows, from top to bottom."""

    def __init__(self, width: int, background: int, effort: Effort) -> None:
        """``background`` is the class whose pixels form no regions; -1 for none."""
        self._width, self._background, self._effort = width, background, effort
        self._rows = self._count = 0
        # By run: its first pixel, counted along the rows; its class; the sum of its pixels' scores.
        self._starts: list[Ints] = []
        self._labels: list[Labels] = []
        self._sums: list[NDArray[np.float64]] = []
        # A forest: each run points to an earlier one of its region, and at last to the first (union-find).
        self._parents = np.empty(0, np.int32)
        self._last_row = np.empty((0, width), np.uint16)

    def add(self, labels: Labels, scores: Array | None) -> None:
        """Take the next rows, and the scores of their pixels; None: each is 1. Raises InvalidArgument."""
        self._effort.spend()
        # The runs of the last row come again, for those of the next to find.
        seen = np.concatenate([self._last_row, labels])
        begins = np.ones(seen.shape, np.bool_)
        np.not_equal(seen[:, 1:], seen[:, :-1], out=begins[:, 1:])
        starts = np.flatnonzero(begins).astype(np.int32)
        of_run = seen.ravel()[starts]
        again, offset = int(np.count_nonzero(begins[: len(self._last_row)])), self._last_row.size
        self._starts.append(starts[again:] + np.int32(self._rows * self._width - offset))
        self._labels.append(of_run[again:])
        if scores is not None:
            self._sums.append(np.add.reduceat(scores.ravel(), starts[again:] - offset, dtype=np.float64))
        self._rows += len(labels)
        self._last_row = labels[-1:].copy()
        base = self._count - again
        if base + len(starts) > MAX_RUNS:
            raise InvalidArgument(f"the classes on the image change more than {MAX_RUNS} times along its rows")
        self._grow(base + len(starts))
        # No row is above the first.
        lower = np.arange(np.count_nonzero(begins[0]), len(starts))
        upper, lower = _touching(begins, starts, lower[of_run[lower] != self._background])
        same = of_run[upper] == of_run[lower]
        self._unite(upper[same] + base, lower[same] + base, base)

    def _grow(self, count: int) -> None:
        if count > len(self._parents):
            grown = np.arange(max(count, 2 * len(self._parents)), dtype=np.int32)
            grown[: self._count] = self._parents[: self._count]
            self._parents = grown
        self._count = count

    def _unite(self, left: NDArray[np.int64], right: NDArray[np.int64], base: int) -> None:
        """Unite the region of each run in ``left`` with that in ``right``; they are all from ``base`` on."""
        while len(left):
            one, other = self._parents[left], self._parents[right]
            differ = one != other
            left, right, one, other = left[differ], right[differ], one[differ], other[differ]
            # Where several pairs write to one place, one wins; the others come again.
            self._parents[np.maximum(one, other)] = np.minimum(one, other)
            self._shorten(base)

    def _shorten(self, base: int) -> None:
        """Point each run from ``base`` on to the first of its region."""
        part = self._parents[base : self._count]
        while True:
            further = self._parents[part]
            if np.array_equal(further, part):
                return
            part[:] = further

    def paint(self, colors: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return an image, (height, width, 3), in the ``colors`` of the classes, (n, 3); after the last they repeat."""
        return self._spread(colors[np.concatenate(self._labels) % len(colors)])

    def _spread(self, of_run: NDArray[Any]) -> NDArray[Any]:
        """Return an image whose pixels have the values of their runs."""
        return np.repeat(of_run, self._lengths(), axis=0).reshape(self._rows, self._width, *of_run.shape[1:])

    def _lengths(self) -> Ints:
        ends: Ints = np.append(np.concatenate(self._starts)[1:], np.int32(self._rows * self._width))
        return ends - np.concatenate(self._starts)

    def largest(self, most: int) -> Regions:
        """Return the largest regions, at most ``most``: by area, then by class, then the lowest first."""
        self._shorten(0)
        parents, labels = self._parents[: self._count], np.concatenate(self._labels)
        areas = np.bincount(parents, weights=self._lengths(), minlength=len(parents))
        # Runs of the background stay alone.
        runs = np.flatnonzero((areas > 0) & (labels != self._background))
        if len(runs) > most:
            runs = runs[areas[runs] >= np.partition(areas[runs], -most)[-most]]
        kept = runs[np.lexsort((-runs, labels[runs], -areas[runs]))][:most]
        sums = np.bincount(parents, weights=np.concatenate(self._sums)) if self._sums else areas
        scores = np.minimum(sums[kept] / areas[kept], 1.0)
        places = np.zeros(len(parents), np.uint16)
        places[kept] = np.arange(1, len(kept) + 1)
        firsts = np.concatenate(self._starts)[kept]
        return Regions(labels[kept], areas[kept].astype(np.int64), scores, firsts, self._spread(places[parents]))


def _touching(
    begins: NDArray[np.bool_], starts: Ints, lower: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return all pairs of a run of ``lower`` and one of the row above that touch: the upper runs, and the lower."""
    width = begins.shape[1]
    number = np.cumsum(begins, dtype=np.int32) - 1
    start, end = starts[lower], np.append(starts[1:], begins.size)[lower] - 1
    first = number[start - width - (start % width > 0)]
    counts = number[end - width + (end % width < width - 1)] - first + 1
    skipped = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(first - skipped, counts), np.repeat(lower, counts)
