"""What a layer's converter is given, and the table of converters by Caffe type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import shapes
from ..caffe_pb2 import LayerParameter
from ..errors import ConversionError
from ..graph import AFFINE, FLOAT, Array, Graph, Node, Value
from ..shapes import Shape


class Blobs(Protocol):
    """Where a layer's weights come from."""

    def count(self, layer: str) -> int:
        """How many blobs the layer has."""

    def take(self, layer: str, index: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The blob in `shape`. Raises ShapeError where it is not there or is another shape."""


Converter = Callable[["LayerContext"], Sequence[Value]]
CONVERTERS: dict[str, Converter] = {}


def converts(*types: str) -> Callable[[Converter], Converter]:
    """Registers a function as the converter of some Caffe layer types.

    The function adds the layer's nodes through its context and returns one value for each top, in order.
    """

    def register(converter: Converter) -> Converter:
        for type_ in types:
            if type_ in CONVERTERS:
                raise ValueError(f"two converters for the layer type {type_}")
            CONVERTERS[type_] = converter
        return converter

    return register


@dataclass
class LayerContext:
    """One layer while it is converted.

    Attributes:
        name: the layer's name, under which its nodes and weights go.
        type: its Caffe type.
        param: its parameter messages.
        bottoms: its inputs.
        tops: its tops' names, for what depends on how many there are.
        batch: the batch that the prototxt declares, by which a literal batch in a Reshape is known; 0 where its inputs
            have several.
        graph: the graph to add to.
        blobs: the weights.
    """

    name: str
    type: str
    param: LayerParameter
    bottoms: tuple[Value, ...]
    tops: tuple[str, ...]
    batch: int
    graph: Graph
    blobs: Blobs
    _nodes: int = 0

    def fail(self, reason: str) -> NoReturn:
        """Stops the conversion with this layer's name and type."""
        raise ConversionError(reason, layer=self.name, layer_type=self.type)

    def bottom(self, least: int = 1, most: int | None = 1) -> Value:
        """The first bottom, after checking how many there are (`most` None: any number)."""
        number = len(self.bottoms)
        if number < least or (most is not None and number > most):
            wanted = str(least) if least == most else f"{least} to {most}" if most else f"at least {least}"
            self.fail(f"has {number} bottoms and needs {wanted}")
        return self.bottoms[0]

    def axis(self, axis: int, value: Value, what: str = "axis") -> int:
        """A Caffe axis of `value` as an index that is not negative."""
        return shapes.axis_of(axis, len(value.shape), what)

    def refuse_batch(self, value: Value, axis: int, doing: str) -> None:
        """Fails if `axis` is the batch's: what Caffe does along it would mix the images of a batch."""
        if isinstance(value.shape[axis], shapes.Symbol) and not _spatial(value.shape[axis]):
            self.fail(f"{doing} along the batch axis {axis} would mix the images of a batch")

    def same(self, left: Sequence[shapes.Dim], right: Sequence[shapes.Dim]) -> bool:
        """Whether two shapes are known to agree.

        Heights and widths that both are open are taken to, where all of them come of one size: the net was written so
        that they do. Of several inputs' sizes nothing is known.
        """
        return len(left) == len(right) and all(
            a == b or (_spatial(a) and _spatial(b) and self.one_size()) for a, b in zip(left, right, strict=True)
        )

    def one_size(self) -> bool:
        """Whether all inputs of an open height and width have the same."""
        sizes = {value.shape[2:] for value in self.graph.inputs if any(map(_spatial, value.shape))}
        return len(sizes) < 2

    def blob(self, index: int, shape: Sequence[int]) -> NDArray[np.float32]:
        """The layer's `index`-th weight, float32 of `shape`."""
        return self.blobs.take(self.name, index, tuple(shape))

    def blob_count(self) -> int:
        """How many weights the caffemodel has for this layer."""
        return self.blobs.count(self.name)

    def constant(self, array: ArrayLike, suffix: str) -> Value:
        """A constant called after the layer: floats become float32, ints int64."""
        numbers: Array = np.asarray(array)
        if numbers.dtype.kind == "f":
            numbers = numbers.astype(np.float32, copy=False)
        return self.graph.add_constant(f"{self.name}/{suffix}", numbers)

    def emit(self, op: str, inputs: Sequence[Value], shape: Shape, dtype: Any = FLOAT, **attributes: Any) -> Value:
        """Adds a node with one output and returns that. The layer's first node has the layer's name."""
        return self.emit_many(op, inputs, [(shape, dtype)], **attributes)[0]

    def emit_many(
        self, op: str, inputs: Sequence[Value | None], outputs: Sequence[tuple[Shape, Any]], **attributes: Any
    ) -> list[Value]:
        """Adds a node with several outputs; an input that is None is left out."""
        name = self.graph.unique_node(self.name if self._nodes == 0 else f"{self.name}/{op}")
        self._nodes += 1
        # Blobs' names go to the layers' results at the end, so these only have to be free.
        made = [
            self.graph.add_value(f"{self.name}/{op}:{i}", shapes.check(shape), np.dtype(dtype))
            for i, (shape, dtype) in enumerate(outputs)
        ]
        sources = [value.name if value else "" for value in inputs]
        self.graph.nodes.append(Node(op, name, sources, [value.name for value in made], dict(attributes)))
        return made

    def affine(self, value: Value, scale: NDArray[np.float64], shift: NDArray[np.float64]) -> Value:
        """value * scale + shift; both scalars or one number a channel (axis 1)."""
        numbers = {"scale": np.asarray(scale, np.float64), "shift": np.asarray(shift, np.float64)}
        return self.emit(AFFINE, [value], value.shape, **numbers)

    def reshape(self, value: Value, shape: Shape) -> Value:
        """`value` with its elements in the same order in `shape`, in which at most one size may be new at run time."""
        if value.shape == shape:
            return value
        if value.name in self.graph.constants:
            array = self.graph.constants[value.name]
            return self.graph.add_constant(f"{self.name}/constant", array.reshape(tuple(map(_int, shape))))
        target = []
        for i, dim in enumerate(shape):
            if not isinstance(dim, shapes.Symbol):
                target.append(dim)
            else:
                target.append(0 if i < len(value.shape) and value.shape[i] == dim else -1)
        if target.count(-1) > 1:
            self.fail(f"the shape {shapes.text(shape)} is not known before run time")
        return self.emit("Reshape", [value, self.constant(target, "shape")], shape, value.dtype)

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """`value` with its axes in another order."""
        if list(order) == sorted(order):
            return value
        shape = tuple(value.shape[axis] for axis in order)
        return self.emit("Transpose", [value], shape, value.dtype, perm=list(order))


def _int(dim: shapes.Dim) -> int:
    return shapes.known(dim, "the shape of a constant")


def _spatial(dim: shapes.Dim) -> bool:
    return isinstance(dim, shapes.Symbol) and dim.name not in (shapes.BATCH, shapes.ROIS)
