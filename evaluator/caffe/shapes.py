"""Shapes with a symbolic batch and, on request, symbolic height and width.

A dimension is an int, or a `Symbol` times an int. A leading dimension of 3*N has three rows of the first image, then
three rows of the second, and so on, which is Caffe's layout of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Caffe's own limits: it counts the elements of a blob in an int, and allows 32 axes.
MAX_COUNT = 2**31 - 1
MAX_AXES = 32
# The name of a computed size is its formula, up to this many letters.
_MAX_SYMBOL = 80


@dataclass(frozen=True)
class Symbol:
    """`factor` times a size known only at run time.

    Equal names mean equal sizes. A long name is replaced by its digest.
    """

    name: str
    factor: int = 1

    def __post_init__(self) -> None:
        if len(self.name) > _MAX_SYMBOL:
            digest = hashlib.blake2b(self.name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
            object.__setattr__(self, "name", f"size({digest})")

    def __str__(self) -> str:
        return self.name if self.factor == 1 else f"{self.factor}*{self.name}"


Dim = int | Symbol
Shape = tuple[Dim, ...]


class ShapeError(ValueError):
    """A shape does not fit its use. The caller that knows the layer converts it to a ConversionError."""


def product(dims: Iterable[Dim]) -> Dim:
    """Return the product of the dimensions: the number of elements.

    Raises:
        ShapeError: more than one dimension is symbolic, or the product exceeds Caffe's limit.
    """
    number, symbol = 1, None
    for dim in dims:
        if isinstance(dim, Symbol):
            if symbol is not None:
                raise ShapeError(f"the product of the sizes {symbol} and {dim} is unknown before run time")
            symbol = dim.name
            number *= dim.factor
        else:
            number *= dim
    if number > MAX_COUNT:
        raise ShapeError(f"{number} elements exceed Caffe's limit of {MAX_COUNT}")
    return number if symbol is None else Symbol(symbol, number)


def known(dim: Dim, what: str) -> int:
    """Return `dim`, which must be an int.

    Args:
        what: the name of the size for the error message.

    Raises:
        ShapeError: `dim` is a symbol.
    """
    if isinstance(dim, Symbol):
        raise ShapeError(f"{what} must be known before run time, but is {dim}")
    return dim


def known_product(dims: Iterable[Dim], what: str) -> int:
    """Return the product of the dimensions, which must all be ints; see `product` and `known`."""
    return known(product(known(dim, what) for dim in dims), what)


def check(shape: Shape) -> Shape:
    """Return `shape` if it is within Caffe's limits for a batch of one.

    Raises:
        ShapeError: the shape is empty, or has too many axes or elements.
    """
    if len(shape) > MAX_AXES:
        raise ShapeError(f"{len(shape)} axes exceed Caffe's limit of {MAX_AXES}")
    count = 1
    for dim in shape:
        size = dim.factor if isinstance(dim, Symbol) else dim
        if size < 1:
            raise ShapeError(f"the shape {text(shape)} is empty")
        count *= size
    if count > MAX_COUNT:
        raise ShapeError(f"the shape {text(shape)} exceeds Caffe's limit of {MAX_COUNT} elements")
    return shape


def axis_of(axis: int, rank: int, what: str = "axis") -> int:
    """Convert a Caffe axis, which can be negative, to an index.

    Raises:
        ShapeError: the axis does not exist.
    """
    if not -rank <= axis < rank:
        raise ShapeError(f"{what} {axis} does not exist in a blob with {rank} axes")
    return axis % rank


def text(shape: Sequence[Dim]) -> str:
    """Format a shape for messages, such as (N, 3, 224, 224)."""
    return "(" + ", ".join(str(dim) for dim in shape) + ")"


BATCH = "N"
# The number of regions (R-CNN nets), which differs from the number of images.
ROIS = "R"
