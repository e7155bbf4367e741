"""Rewriting of the graph, in an order in which each pass leaves nothing for those before it."""

from __future__ import annotations

from ..graph import Graph
from . import affine, dead, dedupe, moves


def run(graph: Graph) -> None:
    """All passes. The names of inputs and outputs stay as they are."""
    dead.remove_unused(graph)
    affine.fold(graph)
    affine.lower(graph)
    moves.simplify(graph)
    dead.remove_unused(graph)
    dedupe.share_constants(graph)
