"""The graph between Caffe and ONNX: ONNX operators, with weights as arrays, open to rewriting.

Beside ONNX's there is one operator of our own, `Affine`: x * scale + shift, with `scale` and `shift` float64 in its
attributes, either scalars or one number a channel (axis 1). BatchNorm, Scale, Bias and Power(1) are all affine, so one
pass folds them into convolutions and one place lowers what is left.
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
# What a value or node is taken to need beside its numbers, here and in the model, and for every letter of its name.
_ENTRY, _LETTER = 512, 8


@dataclass(frozen=True)
class Value:
    """A tensor of the graph by name; `dtype` is float32 for everything that Caffe calls a blob."""

    name: str
    shape: Shape
    dtype: np.dtype[Any] = FLOAT


@dataclass
class Node:
    """One operator. An empty name among `inputs` is an optional input left out."""

    op: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Graph:
    """A net on its way.

    Attributes:
        inputs, outputs: in the order of the net.
        nodes: in an order of execution.
        constants: weights and other known tensors, by the name of the value.
        factors: what a constant is still to be multiplied with, float64 that broadcasts to it. Multiplying when the
            constant is exported keeps a net's weights from being in memory twice.
        values: every value by name.
        masks: by the name of a Pooling's mask, the MaxPool behind it and the name of its indices.
        room: how many bytes may still be added, in constants, values and nodes.
    """

    name: str
    inputs: list[Value] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    factors: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    masks: dict[str, tuple[Node, str]] = field(default_factory=dict)
    room: int = sys.maxsize
    _value_names: dict[str, int] = field(default_factory=dict)
    _node_names: dict[str, int] = field(default_factory=dict)

    def unique(self, name: str) -> str:
        """`name` for a value, or `name` with a number if it is taken; the result is taken from now on."""
        return _unique(name, self._value_names)

    def unique_node(self, name: str) -> str:
        """The same for a node: nodes are called after layers, which often have the names of blobs."""
        self._spend(name)
        return _unique(name, self._node_names)

    def afford(self, size: int) -> None:
        """Raises ShapeError unless a constant of `size` bytes may be added; for large ones, before they are made."""
        if size > self.room:
            raise ShapeError("with it the net would be larger than its files allow")

    def _spend(self, name: str, size: int = 0) -> None:
        cost = _ENTRY + _LETTER * len(name) + size
        self.afford(cost)
        self.room -= cost

    def add_value(self, name: str, shape: Shape, dtype: np.dtype[Any] = FLOAT) -> Value:
        """A new value, under `name` if it is free."""
        self._spend(name)
        value = Value(self.unique(name), shape, dtype)
        self.values[value.name] = value
        return value

    def add_constant(self, name: str, array: Array) -> Value:
        """A new constant, under `name` if it is free. The array is kept, not copied."""
        self.afford(array.nbytes)
        value = self.add_value(name, array.shape, array.dtype)
        self.room -= array.nbytes
        self.constants[value.name] = array
        return value

    def take_constant(self, name: str) -> Array:
        """Removes a constant from the graph and returns it, multiplied with its factor."""
        array, factor = self.constants.pop(name), self.factors.pop(name, None)
        if factor is None:
            return array
        # In float64, but piece by piece: no float64 copy of the whole is made.
        return np.multiply(array, factor, out=np.empty_like(array), dtype=np.float64, casting="unsafe")

    def consumers(self) -> dict[str, list[Node]]:
        """The nodes that read each value, one entry a reading."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                found.setdefault(name, []).append(node)
        return found

    def producers(self) -> dict[str, Node]:
        """The node that makes each value."""
        return {name: node for node in self.nodes for name in node.outputs}

    def rename(self, names: dict[str, str]) -> None:
        """Gives values other names, or puts other values in their place, wherever nodes and outputs speak of them."""
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
        """Takes nodes out of the graph."""
        gone = {id(node) for node in nodes}
        self.nodes = [node for node in self.nodes if id(node) not in gone]


def _unique(name: str, taken: dict[str, int]) -> str:
    stem = candidate = name or "unnamed"
    number = taken.get(stem, 0)
    while candidate in taken:
        number += 1
        candidate = f"{stem}_{number}"
    taken[candidate] = 0
    # Where the search ended, so that many values of one name do not take quadratic time.
    taken[stem] = number
    return candidate


def per_channel(numbers: Array, rank: int) -> Array:
    """One number a channel, shaped to broadcast along axis 1 of a blob of `rank` axes."""
    return numbers.reshape((-1,) + (1,) * (rank - 2)) if numbers.ndim else numbers


def names(values: Sequence[Value]) -> list[str]:
    """The values' names."""
    return [value.name for value in values]
