"""Fold affine maps (BatchNorm, Scale, Bias, Power) into the layer before them, and lower the rest to ONNX."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..graph import AFFINE, Graph, Node, per_channel

Float64 = NDArray[np.float64]

_FOLDABLE = ("Conv", "ConvTranspose", "Gemm")


def fold(graph: Graph) -> None:
    """Fold each affine map into the map, convolution, deconvolution or inner product before it.

    A node whose result has another reader, or is an output, stays as it is. The fold multiplies in float64, so the only
    error is the rounding to float32.
    """
    readers = graph.consumers()
    producers = graph.producers()
    outputs = set(graph.outputs)
    folded = []
    for node in graph.nodes:
        if node.op != AFFINE:
            continue
        source = producers.get(node.inputs[0])
        if source is None or source.outputs[0] in outputs or len(readers[source.outputs[0]]) != 1:
            continue
        if source.op == AFFINE:
            _merge(source, node)
        elif source.op in _FOLDABLE and _owns_weights(graph, source, readers):
            _fold_into(graph, source, node)
        else:
            continue
        # The source takes over the map's output, so that a following map can be folded into it too.
        source.outputs[0] = node.outputs[0]
        producers[node.outputs[0]] = source
        folded.append(node)
    graph.remove(folded)


def _merge(first: Node, second: Node) -> None:
    scale, shift = first.attributes["scale"], first.attributes["shift"]
    first.attributes["shift"] = shift * second.attributes["scale"] + second.attributes["shift"]
    first.attributes["scale"] = scale * second.attributes["scale"]


def _owns_weights(graph: Graph, node: Node, readers: dict[str, list[Node]]) -> bool:
    return all(name in graph.constants and len(readers.get(name, ())) <= 1 for name in node.inputs[1:])


def _fold_into(graph: Graph, node: Node, affine: Node) -> None:
    scale, shift = affine.attributes["scale"], affine.attributes["shift"]
    outputs = graph.values[node.outputs[0]].shape[1]
    assert isinstance(outputs, int)
    scale = np.broadcast_to(scale, (outputs,))
    weight = node.inputs[1]
    graph.factors[weight] = graph.factors.get(weight, 1) * _over_weights(graph.constants[weight].shape, scale, node)
    has_bias = len(node.inputs) > 2
    bias = graph.constants[node.inputs[2]].astype(np.float64) if has_bias else np.zeros(outputs)
    bias = np.broadcast_to(bias * scale + shift, (outputs,)).astype(np.float32)
    if has_bias:
        graph.constants[node.inputs[2]] = bias
    elif bias.any():
        node.inputs.append(graph.add_constant(f"{node.name}/bias", bias).name)


def _over_weights(shape: tuple[int, ...], scale: Float64, node: Node) -> Float64:
    """Arrange one factor per output so that it broadcasts to weights of `shape`."""
    ones = (1,) * (len(shape) - 2)
    if node.op == "ConvTranspose":
        # The weights are (inputs, outputs / group, ...), sorted by group.
        group = node.attributes.get("group", 1)
        return np.repeat(scale.reshape(group, shape[1], *ones), shape[0] // group, axis=0)
    if node.op == "Gemm" and not node.attributes["transB"]:
        return scale.reshape(1, -1)
    return scale.reshape(-1, 1, *ones)


def lower(graph: Graph) -> None:
    """Replace the remaining affine maps by an Identity, a Mul, an Add, both, or one BatchNormalization."""
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.op != AFFINE:
            nodes.append(node)
            continue
        scale, shift = node.attributes["scale"], node.attributes["shift"]
        scales, shifts = bool(np.any(scale != 1)), bool(np.any(shift != 0))
        rank = len(graph.values[node.inputs[0]].shape)
        if not scales and not shifts:
            nodes.append(Node("Identity", node.name, node.inputs, node.outputs))
        elif scales and shifts and (scale.ndim or shift.ndim) and rank > 1:
            nodes.append(_batch_normalization(graph, node))
        else:
            nodes += _mul_add(graph, node, rank, scales, shifts)
    graph.nodes = nodes


def _batch_normalization(graph: Graph, node: Node) -> Node:
    channels = graph.values[node.inputs[0]].shape[1]
    assert isinstance(channels, int)
    # cuDNN requires an epsilon of at least 1e-5; the variance compensates for it.
    epsilon = 1e-5
    numbers = {
        "scale": np.broadcast_to(node.attributes["scale"], (channels,)),
        "bias": np.broadcast_to(node.attributes["shift"], (channels,)),
        "mean": np.zeros(channels),
        "variance": np.full(channels, 1 - epsilon),
    }
    inputs = [
        graph.add_constant(f"{node.name}/{what}", array.astype(np.float32)).name for what, array in numbers.items()
    ]
    return Node("BatchNormalization", node.name, [node.inputs[0], *inputs], node.outputs, {"epsilon": epsilon})


def _mul_add(graph: Graph, node: Node, rank: int, scales: bool, shifts: bool) -> list[Node]:
    steps = [("Mul", node.attributes["scale"], "scale")] if scales else []
    if shifts:
        steps.append(("Add", node.attributes["shift"], "shift"))
    nodes: list[Node] = []
    source = node.inputs[0]
    for i, (op, numbers, what) in enumerate(steps):
        array = per_channel(numbers, rank).astype(np.float32)
        constant = graph.add_constant(f"{node.name}/{what}", array).name
        last = i == len(steps) - 1
        made = node.outputs[0] if last else graph.add_value(f"{node.name}/{op}:0", graph.values[source].shape).name
        name = node.name if i == 0 else graph.unique_node(f"{node.name}/{op}")
        nodes.append(Node(op, name, [source, constant], [made]))
        source = made
    return nodes
