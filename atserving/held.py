"""Bounds the bytes of requests and answers that a process holds: what is over it is refused, not killed for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

LARGE_BYTES = 1 << 16
"""Requests and answers from here on are large."""

_FEW_CALLS = 256


class HeldBytes:
    """Counts bytes. Large requests and answers together leave a quarter of them to the others."""

    def __init__(self, most: int) -> None:
        self.held = 0
        self.reclaim: Callable[[], None] = lambda: None
        """Called before a refusal: gives back what is held no more, but still counts."""
        self.most = most
        """The most bytes that may be held."""
        self._calls = 0
        self._most_large = most - most // 4
        self._owned: Counter[str] = Counter()

    def take(self, count: int, *, large: bool) -> bool:
        """Count more bytes, and return True; return False if there is no room for them."""
        most = self._most_large if large else self.most
        if self.held + count > most:
            self.reclaim()
            if self.held + count > most:
                return False
        self.held += count
        return True

    def give(self, count: int) -> None:
        """Stop counting bytes."""
        self.held -= count

    def begin(self) -> bool:
        """Count a call that begins, and return True if there are more than a few: their headers count, too.

        The headers of a few are no danger, and to count them costs more than all else that this class does.
        """
        self._calls += 1
        return self._calls > _FEW_CALLS

    def end(self) -> None:
        """Count a call that ends."""
        self._calls -= 1

    def share(self, owner: str, count: int) -> Share | None:
        """Let an owner hold so many bytes that count already; return None if it holds too much beside them.

        It may hold twice what is free then: one alone has two thirds of the large bytes, two have two fifths each, and
        there is room for the next. An owner of nothing else may hold whatever has been let in.
        """
        before = self._owned[owner]
        if before and before + count > 2 * (self._most_large - self.held):
            return None
        self._owned[owner] = before + count
        return Share(self, owner)

    def move(self, owner: str, count: int) -> None:
        """Let an owner hold more bytes, or fewer. The owner with none is forgotten."""
        self._owned[owner] += count
        if not self._owned[owner]:
            del self._owned[owner]


class Share:
    """Counts the bytes of one owner."""

    __slots__ = ("_all", "_owner")

    def __init__(self, all_: HeldBytes, owner: str) -> None:
        self._all = all_
        self._owner = owner

    def take(self, count: int, *, large: bool) -> bool:
        """Count more bytes, and return True; return False if there is no room for them. It has room for any answer."""
        if not self._all.take(count, large=large):
            return False
        self._all.move(self._owner, count)
        return True

    def end(self) -> None:
        """Count a call that ends."""
        self._all.end()

    def give(self, count: int) -> None:
        """Stop counting bytes."""
        self._all.give(count)
        self._all.move(self._owner, -count)
