"""Supply the layers with a caffemodel's weights, in the shapes of their converters."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from .caffemodel import Weights
from .shapes import ShapeError


class CaffemodelWeights:
    """The `WeightSource` of a parsed caffemodel."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._used: dict[str, int] = {}

    def count(self, layer: str) -> int:
        """Return the number of the layer's blobs in the caffemodel."""
        return len(self._weights.get(layer, ()))

    def used(self, layer: str) -> int:
        """Return the number of the layer's blobs taken so far."""
        return self._used.get(layer, 0)

    def take(self, layer: str, index: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return the layer's blob number `index` (from 0) as float32 in `shape`.

        Old caffemodels pad every shape to four dimensions with ones: in front, or on both sides for SegNet's BN. So
        leading and trailing ones are ignored; all other dimensions must match.

        Raises:
            ShapeError: the blob does not exist or has another shape.
        """
        blobs = self._weights.get(layer, ())
        self._used[layer] = max(self._used.get(layer, 0), index + 1)
        if index >= len(blobs):
            stored = f"only {len(blobs)} weight blobs" if blobs else "no weights"
            raise ShapeError(f"has {stored} in the caffemodel but needs a blob with the shape {list(shape)}")
        blob = blobs[index]
        if blob.data.size != prod(shape) or _core(blob.dims) != _core(shape):
            raise ShapeError(
                f"weight blob {index} has the shape {list(blob.dims)[:8]} in the caffemodel but needs {list(shape)}"
            )
        return blob.data.reshape(shape)


def _core(dims: Sequence[int]) -> list[int]:
    core = list(dims)
    while core and core[-1] == 1:
        core.pop()
    while core and core[0] == 1:
        core.pop(0)
    return core
