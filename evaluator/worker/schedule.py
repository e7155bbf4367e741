"""What a worker's threads do next: prepare requests, or run a batch of prepared ones. Decides, and does nothing itself.

Knows nothing of threads, clocks, images or nets: who calls holds a lock, and says what time it is.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class Item:
    """One request on its way. Times are seconds of one clock."""

    id: int
    request: Any
    arrived_s: float
    expires_s: float = math.inf
    prepared: Any = None
    prepare_s: float = 0.0
    gone: bool = False
    """Nobody waits for it any more: set while it is being prepared, when it can't be taken out."""


@dataclass(frozen=True)
class Prepare:
    """Prepare these, one after the other, and then say so by :meth:`Schedule.prepared`."""

    items: list[Item]


@dataclass(frozen=True)
class Forward:
    """Run these as one batch: they are out of the schedule."""

    items: list[Item]


@dataclass(frozen=True)
class Expired:
    """Their deadline passed while they waited: they are out, at no further cost."""

    items: list[Item]


@dataclass(frozen=True)
class Wait:
    """Nothing to do until something arrives, or until ``until_s``."""

    until_s: float = math.inf


Work = Prepare | Forward | Expired | Wait


class Schedule:
    """The requests that a worker holds.

    1. A request is in one place at a time: ``_arrived``, being prepared, ``_ready``, or running. It leaves once.
    2. A batch has 1 to ``batch_size`` requests, in the order in which they became ready. No more than ``engines`` run:
       no more threads ask for them.
    3. A free engine takes what is ready at once. Only ``delay_s`` makes it wait for a batch to fill, and never longer
       than that after the oldest arrived.
    4. No more is prepared ahead than every engine's next batch. What has not been taken costs nothing.
    5. Where several engines are idle they share what has arrived: none takes a large batch while another has nothing.
    6. What has expired or was removed is never prepared or run.
    """

    def __init__(self, *, batch_size: int, engines: int, delay_s: float = 0.0) -> None:
        self.batch_size = batch_size
        self.delay_s = delay_s
        self._engines = engines
        self._arrived: deque[Item] = deque()
        self._preparing = 0
        self._ready: deque[Item] = deque()

    def arrive(self, items: Iterable[Item]) -> None:
        """Takes requests in."""
        self._arrived.extend(items)

    def remove(self, item: Item) -> bool:
        """Takes a request out that waits; True where that was so. One in preparation leaves when that is over."""
        item.gone = True
        for queue in (self._arrived, self._ready):
            if item in queue:
                queue.remove(item)
                return True
        return False

    def next(self, now_s: float, *, forwards: bool, prepares: bool, idle: int = 1) -> Work:
        """What a thread is to do that can run batches (``forwards``), prepare (``prepares``), or both.

        ``idle``: how many threads that prepare have nothing to do, the one that asks included.
        """
        if expired := self._expired(now_s):
            return Expired(expired)
        due_s = self._due_s() if forwards else math.inf
        if due_s <= now_s:
            return Forward([self._ready.popleft() for _ in range(min(self.batch_size, len(self._ready)))])
        if prepares and self._arrived and (room := self._room()) > 0:
            # A thread that runs what it prepared takes a batch of it; one that only prepares leaves the rest to others.
            share = math.ceil(len(self._arrived) / idle) if forwards else 1
            items = [self._arrived.popleft() for _ in range(min(share, self.batch_size, room))]
            self._preparing += len(items)
            return Prepare(items)
        return Wait(due_s)

    def prepared(self, item: Item, *, fit: bool) -> bool:
        """An item's preparation is over; True where it waits for an engine now: it is ``fit``, and wanted."""
        self._preparing -= 1
        if fit and not item.gone:
            self._ready.append(item)
            return True
        return False

    @property
    def ready(self) -> int:
        """How many prepared requests wait for an engine."""
        return len(self._ready)

    @property
    def has_arrived(self) -> bool:
        """Whether requests wait that may be prepared now."""
        return bool(self._arrived) and self._room() > 0

    def _room(self) -> int:
        return self.batch_size * self._engines - self._preparing - len(self._ready)

    def _due_s(self) -> float:
        if not self._ready:
            return math.inf
        if len(self._ready) >= self.batch_size:
            return -math.inf
        return min(item.arrived_s for item in self._ready) + self.delay_s

    def _expired(self, now_s: float) -> list[Item]:
        expired = [item for queue in (self._arrived, self._ready) for item in queue if item.expires_s <= now_s]
        for item in expired:
            self.remove(item)
        return expired
