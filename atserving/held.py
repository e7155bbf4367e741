"""Bounds the bytes of requests and answers that a process holds: what is over it is refused, not killed for it."""

from __future__ import annotations

LARGE_BYTES = 1 << 16
"""Requests and answers from here on are large."""


class HeldBytes:
    """Counts bytes. Large requests and answers together leave a quarter of them to the others."""

    def __init__(self, most: int) -> None:
        self.held = 0
        self._most = most
        self._most_large = most - most // 4

    def take(self, count: int, *, large: bool) -> bool:
        """Count more bytes, and return True; return False if there is no room for them."""
        if self.held + count > (self._most_large if large else self._most):
            return False
        self.held += count
        return True

    def give(self, count: int) -> None:
        """Stop counting bytes."""
        self.held -= count
