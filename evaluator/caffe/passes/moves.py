"""Remove copies, and moves without effect."""

from __future__ import annotations

import numpy as np

from ..graph import Graph, Node


def simplify(graph: Graph) -> None:
    """Merge consecutive Reshapes and consecutive Transposes, then remove Identity and every Reshape and Transpose
    without effect. An Identity stays if it is needed to give an output its name."""
    _merge_consecutive(graph)
    _remove_idle(graph)


def _merge_consecutive(graph: Graph) -> None:
    """Connect a Reshape or Transpose to the input of the one before it."""
    producers = graph.producers()
    for node in graph.nodes:
        before = producers.get(node.inputs[0]) if node.inputs else None
        if before is None or before.op != node.op:
            continue
        if node.op == "Transpose":
            node.attributes["perm"] = [before.attributes["perm"][axis] for axis in node.attributes["perm"]]
            node.inputs[0] = before.inputs[0]
        elif node.op == "Reshape" and _gives_same_shape(graph, node, before.inputs[0]):
            node.inputs[0] = before.inputs[0]


def _gives_same_shape(graph: Graph, node: Node, source: str) -> bool:
    """Return whether a Reshape of `source` gives the same shape: a 0 in its target copies a size of its input."""
    old, new = graph.values[source].shape, graph.values[node.outputs[0]].shape
    zeros = np.flatnonzero(graph.constants[node.inputs[1]] == 0)
    return all(i < len(old) and old[i] == new[i] for i in zeros)


def _idle(graph: Graph, node: Node) -> bool:
    if node.op == "Identity":
        return True
    if node.op == "Transpose":
        return list(node.attributes["perm"]) == sorted(node.attributes["perm"])
    return node.op == "Reshape" and graph.values[node.inputs[0]].shape == graph.values[node.outputs[0]].shape


def _remove_idle(graph: Graph) -> None:
    producers = graph.producers()
    outputs = set(graph.outputs)
    fixed = {value.name for value in graph.inputs} | set(graph.constants)
    aliases: dict[str, str] = {}
    idle = []

    def final(name: str) -> str:
        while name in aliases:
            name = aliases[name]
        return name

    for node in graph.nodes:
        if not _idle(graph, node):
            continue
        source, made = final(node.inputs[0]), node.outputs[0]
        if made not in outputs:
            aliases[made] = source
        elif source not in outputs and source not in fixed and source in producers:
            # Keep the output's name: the source's producer now produces it.
            aliases[source] = made
        else:
            continue
        idle.append(node)
    graph.remove(idle)
    graph.rename({name: final(name) for name in aliases})
