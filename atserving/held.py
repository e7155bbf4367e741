"""Bounds the bytes of requests and answers that a process holds: what is over it is refused, not killed for it."""

from __future__ import annotations

from collections.abc import Callable

LARGE_BYTES = 1 << 16
"""Requests and answers from here on are large."""


class HeldBytes:
    """Counts bytes. Large requests and answers together leave a quarter of them to the others."""

    def __init__(self, most: int) -> None:
        self.held = 0
        self.reclaim: Callable[[], None] = lambda: None
        """Called before a refusal: gives back what is held no more, but still counts."""
        self._most = most
        self._most_large = most - most // 4

    def take(self, count: int, *, large: bool) -> bool:
        """Count more bytes, and return True; return False if there is no room for them."""
        most = self._most_large if large else self._most
        if self.held + count > most:
            self.reclaim()
            if self.held + count > most:
                return False
        self.held += count
        return True

    def give(self, count: int) -> None:
        """Stop counting bytes."""
        self.held -= count
