"""The colours of classes on a mask."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from atserving.errors import StartError

SIZE = 256
"""How many classes have a colour of their own; later classes repeat them."""


def palette(colors: object = None) -> NDArray[np.uint8]:
    """Return (256, 3) uint8, red, green and blue per class: ``colors`` first, then the colours of Pascal VOC masks.

    ``colors`` is the value of ``custom_values.colors``. Raises StartError if it is no list of [red, green, blue].
    """
    result = _voc()
    if colors is None:
        return result
    if not isinstance(colors, list) or len(colors) > SIZE or not all(_is_color(color) for color in colors):
        raise StartError(f"custom_values.colors should be a list of at most {SIZE} [red, green, blue], 0 to 255")
    if colors:
        result[: len(colors)] = colors
    return result


def _is_color(color: object) -> bool:
    return (
        isinstance(color, list)
        and len(color) == 3
        and all(isinstance(part, int) and not isinstance(part, bool) and 0 <= part <= 255 for part in color)
    )


def _voc() -> NDArray[np.uint8]:
    """Spread the bits of each index: bits 0, 3, 6, ... go to red from its highest bit down, 1, 4, ... to green, ..."""
    index = np.arange(SIZE)
    colors = np.zeros((SIZE, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    return colors.astype(np.uint8)
