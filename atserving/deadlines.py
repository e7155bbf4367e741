"""The deadlines of many calls, with one timer of the event loop for all of them."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable, Container, Sized
from typing import Protocol

# A few stale entries cost less than to remove them.
_FEW = 64


class _Pending(Container[int], Sized, Protocol):
    """The calls without a reply, by id."""


class Deadlines:
    """Calls ``expire`` with the id of each call whose deadline passes while it is in ``pending``.

    A call needs no removal: an entry without its call is stale, and is dropped when it is due, or when stale entries
    outnumber the others. An id must not come again.
    """

    def __init__(self, pending: _Pending, expire: Callable[[int], None]) -> None:
        self._pending = pending
        self._expire = expire
        self._loop = asyncio.get_running_loop()
        self._heap: list[tuple[float, int]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0

    def add(self, deadline_s: float, id_: int) -> None:
        """Watch a pending call; ``deadline_s`` is of the monotonic clock."""
        heap = self._heap
        heapq.heappush(heap, (deadline_s, id_))
        if self._timer is None or deadline_s < self._timer_s:
            self._start(deadline_s)
        if len(heap) > 2 * len(self._pending) + _FEW:
            self._heap = [each for each in heap if each[1] in self._pending]
            heapq.heapify(self._heap)

    def close(self) -> None:
        """Watch no more calls."""
        self._heap.clear()
        if self._timer:
            self._timer.cancel()

    def _start(self, deadline_s: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer_s = deadline_s
        # The loop's timers may be early by a fraction of a millisecond.
        self._timer = self._loop.call_later(max(deadline_s - time.monotonic(), 0) + 0.001, self._due)

    def _due(self) -> None:
        self._timer = None
        now_s = time.monotonic()
        while self._heap and (self._heap[0][0] <= now_s or self._heap[0][1] not in self._pending):
            _, id_ = heapq.heappop(self._heap)
            if id_ in self._pending:
                self._expire(id_)
        if self._heap and self._timer is None:
            self._start(self._heap[0][0])
