"""Shapes in which the batch, and on request height and width, are symbols.

A dimension is an int, or a `Symbol` times an int. A symbolic leading dimension 3*N lists three rows of the first
image, then three of the second: the order in which Caffe lays out a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Caffe counts a blob's elements in an int and refuses more, and it refuses more axes.
MAX_COUNT = 2**31 - 1
MAX_AXES = 32
# Sizes computed of sizes are called after how, in at most so many letters.
_MAX_SYMBOL = 80


@dataclass(frozen=True)
class Symbol:
    """`factor` times a size known only at run time. Equal names are equal sizes; a long name is kept as its digest."""

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
    """A shape does not fit its use. Whoever knows the layer turns it into a ConversionError."""


def product(dims: Iterable[Dim]) -> Dim:
    """The number of elements. Raises ShapeError for more than one symbol, or for more than Caffe can count."""
    number, symbol = 1, None
    for dim in dims:
        if isinstance(dim, Symbol):
            if symbol is not None:
                raise ShapeError(f"the product of the sizes {symbol} and {dim} is not known before run time")
            symbol = dim.name
            number *= dim.factor
        else:
            number *= dim
    if number > MAX_COUNT:
        raise ShapeError(f"{number} elements are more than Caffe can count")
    return number if symbol is None else Symbol(symbol, number)


def known(dim: Dim, what: str) -> int:
    """`dim` where it is an int; ShapeError saying that `what` has to be known otherwise."""
    if isinstance(dim, Symbol):
        raise ShapeError(f"{what} has to be known, and is {dim}")
    return dim


def known_product(dims: Iterable[Dim], what: str) -> int:
    """The number of elements of dimensions that must all be known."""
    return known(product(known(dim, what) for dim in dims), what)


def check(shape: Shape) -> Shape:
    """`shape` itself, if Caffe could hold it for a batch of one; ShapeError otherwise."""
    if len(shape) > MAX_AXES:
        raise ShapeError(f"{len(shape)} axes are more than Caffe's {MAX_AXES}")
    count = 1
    for dim in shape:
        size = dim.factor if isinstance(dim, Symbol) else dim
        if size < 1:
            raise ShapeError(f"the shape {text(shape)} is empty")
        count *= size
    if count > MAX_COUNT:
        raise ShapeError(f"the shape {text(shape)} has more elements than Caffe can count")
    return shape


def axis_of(axis: int, rank: int, what: str = "axis") -> int:
    """A Caffe axis, which may be negative, as an index; ShapeError where there is no such axis."""
    if not -rank <= axis < rank:
        raise ShapeError(f"{what} {axis} does not exist in a blob of {rank} axes")
    return axis % rank


def text(shape: Sequence[Dim]) -> str:
    """A shape for people: (N, 3, 224, 224)."""
    return "(" + ", ".join(str(dim) for dim in shape) + ")"


BATCH = "N"
# The number of regions in Fast R-CNN's nets, which is not the number of images.
ROIS = "R"
