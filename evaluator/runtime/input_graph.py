"""Moves a release's arithmetic on pixels into its graph.

A batch of uint8 is a quarter of the float32 that the net needs, on its way to the graph and to a GPU, and onnxruntime
scales and transposes faster than numpy. The results are the same: each step is one float32 operation either way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from evaluator.runtime.preprocessing import Arithmetic


def prepend(model: onnx.ModelProto, arithmetic: Arithmetic, *, on_cpu: bool = True) -> None:
    """Replace a model's only input, (n, channels, height, width) float32, by one for pixels.

    The new input is (n, height, width, channels) uint8; new nodes compute the old input from it, under its name. The
    function changes the model in place, since it may be large. ``on_cpu`` chooses the nodes that are fastest there.
    """
    graph = model.graph
    (given,) = graph.input
    steps = _Steps(graph, given.name)
    batch, channels, height, width = given.type.tensor_type.shape.dim
    pixels = onnx.ValueInfoProto(name=steps.name("pixels"))
    pixels.type.tensor_type.elem_type = TensorProto.UINT8
    pixels.type.tensor_type.shape.dim.extend([batch, height, width, channels])
    if not on_cpu:
        # TensorRT accepts bytes only if the first node casts them.
        steps.then("Cast", to=TensorProto.FLOAT)
    steps.then("Transpose", perm=[0, 3, 1, 2])
    if arithmetic.order:
        steps.then("Gather", np.array(arithmetic.order, np.int64), axis=1)
    if on_cpu:
        # Moving bytes is cheaper than moving floats, and one pass both converts and scales them.
        steps.then("DequantizeLinear", arithmetic.scale)
    elif arithmetic.scale != 1:
        steps.then("Mul", arithmetic.scale)
    if arithmetic.shift is not None:
        steps.then("Sub", arithmetic.shift)
    nodes = steps.chained(pixels.name)
    graph.input.pop()
    graph.input.append(pixels)
    for index, node in enumerate(nodes):
        graph.node.insert(index, node)


class _Steps:
    """A chain of nodes; the last one makes ``result``."""

    def __init__(self, graph: onnx.GraphProto, result: str) -> None:
        self._graph = graph
        self._result = result
        self._taken = {name for node in graph.node for name in (node.name, *node.input, *node.output)}
        self._nodes: list[onnx.NodeProto] = []

    def name(self, base: str) -> str:
        """Return a name unused in the graph."""
        while base in self._taken:
            base += "_"
        self._taken.add(base)
        return base

    def then(self, op: str, constant: NDArray[np.generic] | np.generic | None = None, **attributes: Any) -> None:
        """Add a node whose second input, if any, is ``constant``."""
        node = helper.make_node(op, [""], [""], name=self.name(f"pixels/{op}"), **attributes)
        if constant is not None:
            node.input.append(self.name(f"pixels/{op}/constant"))
            self._graph.initializer.append(numpy_helper.from_array(np.asarray(constant), node.input[1]))
        self._nodes.append(node)

    def chained(self, source: str) -> list[onnx.NodeProto]:
        """Return the nodes, connected from the value ``source`` on."""
        for node in self._nodes:
            node.input[0] = source
            source = self._result if node is self._nodes[-1] else self.name(f"{node.name}/output")
            node.output[0] = source
        return self._nodes
