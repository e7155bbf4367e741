"""Optimize the graph in passes. In this order, one run of each is enough."""

from __future__ import annotations

from ..graph import Graph
from . import affine, dead, dedupe, moves


def run(graph: Graph) -> None:
    """Run all passes on the graph. The names of inputs and outputs do not change."""
    dead.remove_unused(graph)
    affine.fold(graph)
    affine.lower(graph)
    moves.simplify(graph)
    dead.remove_unused(graph)
    dedupe.share_constants(graph)
