"""The table of converters by Caffe type, and the context of one conversion."""

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


class WeightSource(Protocol):
    """A source of the layers' weight blobs."""

    def count(self, layer: str) -> int:
        """Return the number of the layer's blobs."""

    def take(self, layer: str, index: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return the layer's blob number `index` (from 0) in `shape`.

        Raises:
            ShapeError: the blob does not exist or has another shape.
        """


Converter = Callable[["LayerContext"], Sequence[Value]]
CONVERTERS: dict[str, Converter] = {}


def converts(*types: str) -> Callable[[Converter], Converter]:
    """Register a function as the converter of the given Caffe layer types.

    The function adds the layer's nodes through its context and returns one value per top, in order.
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
    """The context of one layer's conversion.

    Attributes:
        name: the layer's name; the names of its nodes and weights begin with it.
        type: the layer's Caffe type.
        param: the layer's parameter messages.
        bottoms: the layer's inputs.
        tops: the names of the layer's tops.
        batch: the declared batch size, or 0 if the inputs declare several. It identifies a literal batch size in a
            Reshape.
        graph: the graph that receives the nodes.
        blobs: the weights of all layers.
    """

    name: str
    type: str
    param: LayerParameter
    bottoms: tuple[Value, ...]
    tops: tuple[str, ...]
    batch: int
    graph: Graph
    blobs: WeightSource
    _nodes: int = 0

    def fail(self, reason: str) -> NoReturn:
        """Raise a ConversionError that names this layer and its type."""
        raise ConversionError(reason, layer=self.name, layer_type=self.type)

    def bottom(self, least: int = 1, most: int | None = 1) -> Value:
        """Check the number of bottoms and return the first. `most` is None for no upper limit."""
        number = len(self.bottoms)
        if number < least or (most is not None and number > most):
            needed = str(least) if least == most else f"{least} to {most}" if most else f"at least {least}"
            self.fail(f"has {number} bottoms but needs {needed}")
        return self.bottoms[0]

    def axis(self, axis: int, value: Value, what: str = "axis") -> int:
        """Convert a Caffe axis of `value`, which can be negative, to an index."""
        return shapes.axis_of(axis, len(value.shape), what)

    def refuse_batch(self, value: Value, axis: int, operation: str) -> None:
        """Refuse an operation along the batch axis, because it would mix the images of a batch."""
        if isinstance(value.shape[axis], shapes.Symbol) and not _spatial(value.shape[axis]):
            self.fail(f"{operation} along the batch axis {axis} would mix the images of a batch")

    def same(self, left: Sequence[shapes.Dim], right: Sequence[shapes.Dim]) -> bool:
        """Return whether two shapes agree.

        Symbolic heights and widths count as equal if all inputs share one symbolic size, because the prototxt's own
        sizes agree. They are unknown if inputs have several sizes.
        """
        return len(left) == len(right) and all(
            a == b or (_spatial(a) and _spatial(b) and self.one_size()) for a, b in zip(left, right, strict=True)
        )

    def one_size(self) -> bool:
        """Return whether all inputs with a symbolic height and width share one size."""
        sizes = {value.shape[2:] for value in self.graph.inputs if any(map(_spatial, value.shape))}
        return len(sizes) < 2

    def blob(self, index: int, shape: Sequence[int]) -> NDArray[np.float32]:
        """Return the layer's weight blob number `index` (from 0) as float32 in `shape`."""
        return self.blobs.take(self.name, index, tuple(shape))

    def blob_count(self) -> int:
        """Return the number of this layer's weight blobs in the caffemodel."""
        return self.blobs.count(self.name)

    def constant(self, array: ArrayLike, suffix: str) -> Value:
        """Add a constant named `<layer>/<suffix>`. Floats become float32, Python ints int64."""
        numbers: Array = np.asarray(array)
        if numbers.dtype.kind == "f":
            numbers = numbers.astype(np.float32, copy=False)
        return self.graph.add_constant(f"{self.name}/{suffix}", numbers)

    def emit(self, op: str, inputs: Sequence[Value], shape: Shape, dtype: Any = FLOAT, **attributes: Any) -> Value:
        """Add a node with one output and return the output. The layer's first node gets the layer's name."""
        return self.emit_many(op, inputs, [(shape, dtype)], **attributes)[0]

    def emit_many(
        self, op: str, inputs: Sequence[Value | None], outputs: Sequence[tuple[Shape, Any]], **attributes: Any
    ) -> list[Value]:
        """Add a node with several outputs and return them. None omits an optional input."""
        name = self.graph.unique_node(self.name if self._nodes == 0 else f"{self.name}/{op}")
        self._nodes += 1
        # Temporary unique names: the conversion renames the layers' results to their blobs' names at the end.
        made = [
            self.graph.add_value(f"{self.name}/{op}:{i}", shapes.check(shape), np.dtype(dtype))
            for i, (shape, dtype) in enumerate(outputs)
        ]
        sources = [value.name if value else "" for value in inputs]
        self.graph.nodes.append(Node(op, name, sources, [value.name for value in made], dict(attributes)))
        return made

    def affine(self, value: Value, scale: NDArray[np.float64], shift: NDArray[np.float64]) -> Value:
        """Add value * scale + shift; each of the two is a scalar or has one number per channel (axis 1)."""
        numbers = {"scale": np.asarray(scale, np.float64), "shift": np.asarray(shift, np.float64)}
        return self.emit(AFFINE, [value], value.shape, **numbers)

    def reshape(self, value: Value, shape: Shape) -> Value:
        """Add a Reshape of `value` to `shape`, unless it has that shape.

        At most one symbolic size can differ from the size on the same axis of `value`.
        """
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
            self.fail(f"the shape {shapes.text(shape)} is unknown before run time")
        return self.emit("Reshape", [value, self.constant(target, "shape")], shape, value.dtype)

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """Add a Transpose of `value` to the given order of axes, unless it is already in order."""
        if list(order) == sorted(order):
            return value
        shape = tuple(value.shape[axis] for axis in order)
        return self.emit("Transpose", [value], shape, value.dtype, perm=list(order))


def _int(dim: shapes.Dim) -> int:
    return shapes.known(dim, "the shape of a constant")


def _spatial(dim: shapes.Dim) -> bool:
    return isinstance(dim, shapes.Symbol) and dim.name not in (shapes.BATCH, shapes.ROIS)
