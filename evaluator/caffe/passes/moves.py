"""Removes operators that only move or copy data to where it already is."""

from __future__ import annotations

import numpy as np

from ..graph import Graph, Node


def simplify(graph: Graph) -> None:
    """Drops Identity, and Reshape and Transpose that do nothing; joins a Reshape to a Reshape, a Transpose to a
    Transpose before it. What stays is what an output's name or an actual move needs."""
    _join(graph)
    _drop_idle(graph)


def _join(graph: Graph) -> None:
    """Lets a Reshape or Transpose read what the one before it read."""
    producers = graph.producers()
    for node in graph.nodes:
        before = producers.get(node.inputs[0]) if node.inputs else None
        if before is None or before.op != node.op:
            continue
        if node.op == "Transpose":
            node.attributes["perm"] = [before.attributes["perm"][axis] for axis in node.attributes["perm"]]
            node.inputs[0] = before.inputs[0]
        elif node.op == "Reshape" and _keeps_meaning(graph, node, before.inputs[0]):
            node.inputs[0] = before.inputs[0]


def _keeps_meaning(graph: Graph, node: Node, source: str) -> bool:
    """Whether a Reshape gives the same shape from `source`: its zeros stand for sizes of what it reads."""
    old, new = graph.values[source].shape, graph.values[node.outputs[0]].shape
    zeros = np.flatnonzero(graph.constants[node.inputs[1]] == 0)
    return all(i < len(old) and old[i] == new[i] for i in zeros)


def _idle(graph: Graph, node: Node) -> bool:
    if node.op == "Identity":
        return True
    if node.op == "Transpose":
        return list(node.attributes["perm"]) == sorted(node.attributes["perm"])
    return node.op == "Reshape" and graph.values[node.inputs[0]].shape == graph.values[node.outputs[0]].shape


def _drop_idle(graph: Graph) -> None:
    producers = graph.producers()
    outputs = set(graph.outputs)
    fixed = {value.name for value in graph.inputs} | set(graph.constants)
    aliases: dict[str, str] = {}
    gone = []

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
            # The output's name has to live on, so what made the source makes it now.
            aliases[source] = made
        else:
            continue
        gone.append(node)
    graph.remove(gone)
    graph.rename({name: final(name) for name in aliases})
