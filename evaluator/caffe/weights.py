"""Hands a caffemodel's blobs to the layers, in the shapes they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from .caffemodel import Weights
from .shapes import ShapeError


class LoadedBlobs:
    """The `Blobs` of a caffemodel that has been read."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._used: dict[str, int] = {}

    def count(self, layer: str) -> int:
        """How many blobs the caffemodel has for the layer."""
        return len(self._weights.get(layer, ()))

    def used(self, layer: str) -> int:
        """How many of them were asked for."""
        return self._used.get(layer, 0)

    def take(self, layer: str, index: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The layer's `index`-th blob as float32 of `shape`.

        Old caffemodels pad every shape to four dimensions, with ones in front or, for SegNet's BN, around: ones at
        either end make no difference, every other disagreement does.

        Raises:
            ShapeError: no such blob, or one of another shape.
        """
        blobs = self._weights.get(layer, ())
        self._used[layer] = max(self._used.get(layer, 0), index + 1)
        if index >= len(blobs):
            have = f"only {len(blobs)} weight blobs" if blobs else "no weights"
            raise ShapeError(f"has {have} in the caffemodel, and needs one of the shape {list(shape)}")
        blob = blobs[index]
        if blob.data.size != prod(shape) or _core(blob.dims) != _core(shape):
            raise ShapeError(
                f"weight blob {index} has the shape {list(blob.dims)[:8]} in the caffemodel, and needs {list(shape)}"
            )
        return blob.data.reshape(shape)


def _core(dims: Sequence[int]) -> list[int]:
    core = list(dims)
    while core and core[-1] == 1:
        core.pop()
    while core and core[0] == 1:
        core.pop(0)
    return core
