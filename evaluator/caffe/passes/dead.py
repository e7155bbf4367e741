"""Remove unused nodes, constants and values."""

from __future__ import annotations

from ..graph import Graph


def remove_unused(graph: Graph) -> None:
    """Remove nodes, constants and values that no output depends on. All inputs stay."""
    needed = set(graph.outputs)
    kept = []
    for node in reversed(graph.nodes):
        if not needed.isdisjoint(node.outputs):
            kept.append(node)
            needed.update(node.inputs)
    graph.nodes = kept[::-1]
    graph.constants = {name: array for name, array in graph.constants.items() if name in needed}
    graph.factors = {name: factor for name, factor in graph.factors.items() if name in needed}
    made = {name for node in graph.nodes for name in node.outputs}
    inputs = {value.name for value in graph.inputs}
    graph.values = {
        name: value for name, value in graph.values.items() if name in made or name in graph.constants or name in inputs
    }
