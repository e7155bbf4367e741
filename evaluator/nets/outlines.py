"""Finds the outlines of the regions of a label map."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from atserving.errors import InvalidArgument
from evaluator.nets.effort import Effort
from evaluator.nets.enlarging import row_blocks
from evaluator.nets.label_map import Regions

MAX_POINTS = 1 << 21
"""How many corners the outlines of an image may have together."""


def outlines(regions: Regions, effort: Effort) -> list[NDArray[np.int32]]:
    """Return the outline of each region, (n, 2): x and y of its corners, from its first pixel on.

    Raises InvalidArgument for too many corners.
    """
    numbers, count = regions.numbers, len(regions.firsts)
    found = [np.empty((0, 2), np.int32)] * count
    of_first = {first: number for number, first in enumerate(regions.firsts.tolist())}
    colors = _colors(_touching(numbers, count, effort))
    painted = colors[numbers]
    points = 0
    for color in range(1, int(colors.max()) + 1):
        effort.spend()
        # OpenCV tells outlines from the borders of holes only in a time that grows with the square of their number.
        borders, _ = cv2.findContours((painted == color).view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
        for border in borders:
            x, y = border[0, 0].tolist()
            # The border of a hole begins elsewhere.
            number = of_first.get(y * numbers.shape[1] + x)
            if number is not None:
                found[number] = border.reshape(-1, 2)
                points += len(border)
        if points > MAX_POINTS:
            raise InvalidArgument(f"the outlines of the image's regions have more than {MAX_POINTS} corners")
    return found


def _touching(numbers: NDArray[np.uint16], count: int, effort: Effort) -> NDArray[np.bool_]:
    """Return which regions touch, also at a corner, as (count + 1, count + 1)."""
    touch = np.zeros((count + 1) ** 2, np.bool_)
    for rows in row_blocks(*numbers.shape):
        effort.spend()
        here, right = numbers[rows], numbers[rows, 1:]
        below = numbers[rows.start + 1 : rows.stop + 1]
        above = here[: len(below)]
        pairs = ((here[:, :-1], right), (above, below), (above[:, :-1], below[:, 1:]), (above[:, 1:], below[:, :-1]))
        for one, other in pairs:
            differ = one != other
            touch[one[differ].astype(np.int64) * (count + 1) + other[differ]] = True
    result = touch.reshape(count + 1, count + 1)
    result[0] = result[:, 0] = False
    return result | result.T


def _colors(touch: NDArray[np.bool_]) -> NDArray[np.uint16]:
    """Give each region a colour that no region has which it touches, from 1 on; a few are enough. 0 has none.

    OpenCV then finds all outlines of one colour in one pass.
    """
    colors = np.zeros(len(touch), np.uint16)
    for number in range(1, len(touch)):
        taken = set(colors[touch[number]].tolist())
        colors[number] = next(color for color in range(1, len(touch)) if color not in taken)
    return colors
