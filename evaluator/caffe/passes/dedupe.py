"""Store equal constants once."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import numpy as np

from ..graph import Array, Graph


def share_constants(graph: Graph) -> None:
    """Replace every constant by the first constant with the same dtype, shape, bytes and pending factor."""
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, array in graph.constants.items():
        alike[str(array.dtype), array.shape].append(name)
    replaced: dict[str, str] = {}
    for names in alike.values():
        first: dict[bytes, str] = {}
        # Hash only constants that share dtype and shape with another: the large weights of most nets do not.
        for name in names if len(names) > 1 else ():
            hashed = hashlib.blake2b(_bytes(graph.constants[name]), digest_size=32)
            hashed.update(_bytes(graph.factors.get(name, np.empty(0))))
            digest = hashed.digest()
            if first.setdefault(digest, name) != name:
                replaced[name] = first[digest]
    for name in replaced:
        del graph.constants[name]
        graph.factors.pop(name, None)
    graph.rename(replaced)


def _bytes(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
