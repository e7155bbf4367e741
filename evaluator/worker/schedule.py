"""Decides what a worker's threads do next: prepare requests, or run a batch of prepared ones.

This module knows nothing of threads, clocks, images or nets. The caller holds a lock and passes the time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False, slots=True)
class Item:
    """One request. Times are seconds of one clock."""

    id: int
    request: Any
    arrived_s: float
    expires_s: float = math.inf
    prepared: Any = None
    prepare_s: float = 0.0
    cancelled: bool = False
    """Its caller has left; set during preparation, when the schedule can't remove it."""
    batched: bool = False
    """It is a task of a batch."""
    began_s: float = 0.0
    """When its preparation began; 0: it has not."""
    again: bool = False
    """The batch that it was in failed as a whole, so it runs again, alone."""


@dataclass(slots=True)
class Prepare:
    """Prepare these one after the other, and report each to :meth:`Schedule.prepared`."""

    items: list[Item]


@dataclass(slots=True)
class Forward:
    """Run these as one batch; they have left the schedule."""

    items: list[Item]


@dataclass(slots=True)
class Expired:
    """Their deadline passed while they waited; they have left the schedule."""

    items: list[Item]


@dataclass(slots=True)
class Wait:
    """Wait until a request arrives, or until ``until_s``."""

    until_s: float = math.inf


Work = Prepare | Forward | Expired | Wait


class Schedule:
    """The queue of a worker.

    1. A request is in one state at a time: arrived, being prepared, ready, or running. It leaves once.
    2. A batch has 1 to ``batch_size`` requests, in the order in which they became ready. At most ``engines`` batches
       run, since no more threads ask for them.
    3. A free engine takes all ready requests at once. Only ``delay_s`` makes it wait for a full batch, at most so long
       after the oldest arrived, and only while more can come.
    4. The schedule prepares no more than every engine's next batch. A request that no thread has taken costs nothing.
    5. Idle engines share the arrived requests: none takes a large batch while another has nothing.
    6. An expired or removed request is never prepared or run.
    """

    def __init__(self, *, batch_size: int, engines: int, delay_s: float = 0.0) -> None:
        self.batch_size = batch_size
        self.delay_s = delay_s
        self._engines = engines
        self._arrived: deque[Item] = deque()
        self._preparing = 0
        self._ready: deque[Item] = deque()

    def arrive(self, items: Iterable[Item]) -> None:
        """Take requests in."""
        self._arrived.extend(items)

    def remove(self, item: Item) -> bool:
        """Remove a waiting request and return True. A request in preparation leaves afterwards: return False."""
        item.cancelled = True
        for queue in (self._arrived, self._ready):
            if item in queue:
                queue.remove(item)
                return True
        return False

    def next(self, now_s: float, *, forwards: bool, prepares: bool, idle: int = 1, full: bool = False) -> Work:
        """Return the next work of a thread that can run batches (``forwards``), prepare (``prepares``), or both.

        ``idle`` counts the preparing threads without work, including the one that asks. ``full``: no other request can
        arrive before one is done.
        """
        if expired := self._expired(now_s):
            return Expired(expired)
        due_s = self._due_s(full) if forwards else math.inf
        if due_s <= now_s:
            return Forward([self._ready.popleft() for _ in range(min(self.batch_size, len(self._ready)))])
        if prepares and self._arrived and (room := self._room()) > 0:
            # A thread that also runs batches takes a batch; one that only prepares takes one request.
            share = math.ceil(len(self._arrived) / idle) if forwards else 1
            items = [self._arrived.popleft() for _ in range(min(share, self.batch_size, room))]
            self._preparing += len(items)
            return Prepare(items)
        return Wait(due_s)

    def prepared(self, item: Item, *, fit: bool) -> bool:
        """Take an item back after preparation. Return True if it now waits for an engine: ``fit``, and still wanted."""
        self._preparing -= 1
        if fit and not item.cancelled:
            self._ready.append(item)
            return True
        return False

    @property
    def ready(self) -> int:
        """The number of prepared requests that wait for an engine."""
        return len(self._ready)

    @property
    def has_arrived(self) -> bool:
        """Whether there are requests to prepare now."""
        return bool(self._arrived) and self._room() > 0

    def _room(self) -> int:
        return self.batch_size * self._engines - self._preparing - len(self._ready)

    def _due_s(self, full: bool) -> float:
        if not self._ready:
            return math.inf
        if len(self._ready) >= self.batch_size or (full and not self._arrived and not self._preparing):
            return -math.inf
        return min(item.arrived_s for item in self._ready) + self.delay_s

    def _expired(self, now_s: float) -> list[Item]:
        expired = [item for queue in (self._arrived, self._ready) for item in queue if item.expires_s <= now_s]
        for item in expired:
            self.remove(item)
        return expired
