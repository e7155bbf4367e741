"""The intermediate graph between Caffe and ONNX: ONNX operators with weights as arrays, which the passes rewrite.

The graph has one operator beyond ONNX's: `Affine`, x * scale + shift. Its attributes `scale` and `shift` are float64,
either scalars or one number per channel (axis 1). BatchNorm, Scale, Bias and Power(1) all become `Affine`, so that one
pass can fold them into convolutions and then lower the rest to ONNX.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .shapes import Shape, ShapeError

Array = NDArray[Any]
FLOAT = np.dtype(np.float32)
AFFINE = "Affine"
# Estimated memory of a value or node beyond its numbers, here and in the model, plus an amount per letter of its name.
_ENTRY_BYTES, _LETTER_BYTES = 512, 8


@dataclass(frozen=True)
class Value:
    """A named tensor of the graph. Every Caffe blob is float32; other dtypes are intermediate results."""

    name: str
    shape: Shape
    dtype: np.dtype[Any] = FLOAT


@dataclass
class Node:
    """One operator. An empty name in `inputs` omits an optional input."""

    op: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Graph:
    """A net during its conversion.

    Attributes:
        inputs, outputs: in the order of the net.
        nodes: in execution order.
        constants: weights and other known tensors, by the name of the value.
        factors: pending factors of constants, by the name of the value; float64 that broadcasts to the constant. The
            export multiplies, so that the weights are never in memory twice.
        values: every value by name.
        masks: for the name of each Pooling mask, its MaxPool node and the name of the node's indices.
        byte_budget: the remaining memory for constants, values and nodes, in bytes.
    """

    name: str
    inputs: list[Value] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    factors: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    masks: dict[str, tuple[Node, str]] = field(default_factory=dict)
    byte_budget: int = sys.maxsize
    _value_names: dict[str, int] = field(default_factory=dict)
    _node_names: dict[str, int] = field(default_factory=dict)

    def unique(self, name: str) -> str:
        """Reserve a name for a value: `name`, or `name` with a number if it is already used."""
        return _unique(name, self._value_names)

    def unique_node(self, name: str) -> str:
        """Reserve a name for a node. Nodes and values have separate names: layers often share names with blobs."""
        self._spend(name)
        return _unique(name, self._node_names)

    def check_budget(self, size: int) -> None:
        """Check that a constant of `size` bytes fits the budget. Call it before allocating a large constant.

        Raises:
            ShapeError: the constant does not fit.
        """
        if size > self.byte_budget:
            raise ShapeError("the converted net would exceed its memory limit")

    def _spend(self, name: str, size: int = 0) -> None:
        cost = _ENTRY_BYTES + _LETTER_BYTES * len(name) + size
        self.check_budget(cost)
        self.byte_budget -= cost

    def add_value(self, name: str, shape: Shape, dtype: np.dtype[Any] = FLOAT) -> Value:
        """Add a value, named `name` or, if that is already used, `name` with a number."""
        self._spend(name)
        value = Value(self.unique(name), shape, dtype)
        self.values[value.name] = value
        return value

    def add_constant(self, name: str, array: Array) -> Value:
        """Add a constant, named as in `add_value`. The graph keeps the array itself, not a copy."""
        self.check_budget(array.nbytes)
        value = self.add_value(name, array.shape, array.dtype)
        self.byte_budget -= array.nbytes
        self.constants[value.name] = array
        return value

    def take_constant(self, name: str) -> Array:
        """Remove a constant from the graph and return it, multiplied by its factor."""
        array, factor = self.constants.pop(name), self.factors.pop(name, None)
        if factor is None:
            return array
        # `out` and `casting` make NumPy multiply in float64 in small pieces, without a float64 copy of the array.
        return np.multiply(array, factor, out=np.empty_like(array), dtype=np.float64, casting="unsafe")

    def consumers(self) -> dict[str, list[Node]]:
        """Return the nodes that read each value; a node appears once per input that reads it."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                found.setdefault(name, []).append(node)
        return found

    def producers(self) -> dict[str, Node]:
        """Return the node that produces each value."""
        return {name: node for node in self.nodes for name in node.outputs}

    def rename(self, names: dict[str, str]) -> None:
        """Rename values in nodes, outputs and constants. A new name that already exists replaces the old value."""
        if not names:
            return
        for node in self.nodes:
            node.inputs = [names.get(name, name) for name in node.inputs]
            node.outputs = [names.get(name, name) for name in node.outputs]
        self.outputs = [names.get(name, name) for name in self.outputs]
        for old, new in names.items():
            value = self.values.pop(old)
            if new not in self.values:
                self.values[new] = Value(new, value.shape, value.dtype)
                if old in self.constants:
                    self.constants[new] = self.constants.pop(old)
                if old in self.factors:
                    self.factors[new] = self.factors.pop(old)

    def remove(self, nodes: Iterable[Node]) -> None:
        """Remove nodes from the graph."""
        removed = {id(node) for node in nodes}
        self.nodes = [node for node in self.nodes if id(node) not in removed]


def _unique(name: str, used: dict[str, int]) -> str:
    stem = candidate = name or "unnamed"
    number = used.get(stem, 0)
    while candidate in used:
        number += 1
        candidate = f"{stem}_{number}"
    used[candidate] = 0
    # The next search for this stem continues here; otherwise many values with one name would take quadratic time.
    used[stem] = number
    return candidate


def per_channel(numbers: Array, rank: int) -> Array:
    """Reshape one number per channel to broadcast along axis 1 of a blob with `rank` axes; scalars stay scalars."""
    return numbers.reshape((-1,) + (1,) * (rank - 2)) if numbers.ndim else numbers


def names(values: Sequence[Value]) -> list[str]:
    """Return the names of the values."""
    return [value.name for value in values]
