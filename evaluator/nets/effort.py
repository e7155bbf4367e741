"""Bounds the cost of one request after the forward pass of a built-in net."""

from __future__ import annotations

import time

from atserving.errors import InvalidArgument

MAX_SCORES = 1 << 30
"""How many scores of single pixels for single classes may be compared."""
MAX_CPU_S = 10.0
"""The CPU time; a busy machine does not shorten it."""


class Effort:
    """The scores and the CPU time that a request may still take. It stays in one thread."""

    def __init__(self) -> None:
        self._scores = MAX_SCORES
        self._until_s = time.thread_time() + MAX_CPU_S

    def spend(self, scores: int = 0) -> None:
        """Count the comparison of ``scores``, and check the time. Raises InvalidArgument."""
        self._scores -= scores
        if self._scores < 0:
            raise InvalidArgument(
                "the image has too many pixels for the classes on it: "
                f"it would take more than {MAX_SCORES} scores; send a smaller image"
            )
        if time.thread_time() > self._until_s:
            raise InvalidArgument(f"the image takes more than {MAX_CPU_S:g} s after the net; send a smaller image")
