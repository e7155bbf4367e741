"""Bounds the requests in flight in an instance, and refuses the rest at once; while draining, it refuses all.

Requests whose resources have to be fetched have places of their own until the bytes are there.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from atserving.errors import ResourceExhausted, Unavailable
from evaluator.limits import most_batched

REFUSALS = ("full", "batches", "fetching", "host", "memory", "away", "leaving")
"""Why an instance refuses requests."""

_LEAST_RETRY_AFTER_S = 0.05


class Capacity:
    """Counts requests from their arrival to their reply; neither ``in_flight`` nor ``fetching`` exceeds ``limit``.

    After the limit is lowered, requests in flight may still finish.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self.fetching = 0
        # Of those, the number by host, where a request counts for each of its hosts; and those that have fetched, and
        # wait for a place among the requests in flight: tasks of batches behind all others.
        self._by_host: Counter[str] = Counter()
        self._fetched: dict[bool, deque[asyncio.Future[None]]] = {False: deque(), True: deque()}
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()
        # The seconds per request in flight, averaged over the last few: it predicts when capacity is free again.
        self._each_s = 0.0

    def _most(self, batched: bool) -> int:
        return most_batched(self.limit) if batched else self.limit

    def enter(self, *, batched: bool = False) -> int:
        """Count one request; return how many are in flight now. Tasks of batches leave a quarter to others.

        Raises ResourceExhausted at the limit, Unavailable while draining; both ``refused``.
        """
        self.check(batched=batched)
        self.in_flight += 1
        if self.in_flight == 1:
            self._empty.clear()
        return self.in_flight

    def check(self, *, batched: bool = False) -> None:
        """Raise what :meth:`enter` would raise now."""
        if self._draining:
            raise _leaving()
        if self.in_flight >= self._most(batched):
            which = "its limit for tasks of batches" if batched else "its limit"
            refusal = "full" if self.in_flight >= self.limit else "batches"
            raise self.full(f"the instance has {self.in_flight} requests in flight, which is {which}", refusal)

    def full(self, message: str, refusal: str) -> ResourceExhausted:
        """Return the refusal of a request for one of REFUSALS, with the time after which there may be room for it."""
        wait_s = max(self.in_flight * self._each_s, _LEAST_RETRY_AFTER_S)
        return ResourceExhausted(message, retry_after_s=wait_s, refused=True, refusal=refusal)

    @asynccontextmanager
    async def fetch(self, hosts: Collection[str], *, batched: bool = False) -> AsyncIterator[None]:
        """Count a request that fetches from ``hosts`` during the block; then wait until it is one in flight.

        Requests to one host have at most half of the places. Raises as :meth:`enter` does.
        """
        if self._draining:
            raise _leaving()
        if self.fetching >= self._most(batched):
            raise self.full(
                f"the instance fetches the resources of {self.fetching} requests, which is its limit", "fetching"
            )
        most = max((self._by_host[each] for each in hosts), default=0)
        if most >= max(self.limit // 2, 1):
            raise self.full(f"the instance fetches the resources of {most} requests from this host", "host")
        self.fetching += 1
        self._by_host.update(hosts)
        self._empty.clear()
        try:
            yield
            await self._enter_later(batched)
        finally:
            self.fetching -= 1
            for each in hosts:
                self._by_host[each] -= 1
                if not self._by_host[each]:
                    del self._by_host[each]
            self._check_empty()

    async def _enter_later(self, batched: bool) -> None:
        if self.in_flight < self._most(batched) and not self._fetched[batched]:
            self.in_flight += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._fetched[batched].append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                # It had got a place meanwhile.
                self._left()
            raise

    def _left(self) -> None:
        self.in_flight -= 1
        for batched, turns in self._fetched.items():
            while turns and self.in_flight < self._most(batched):
                if not (turn := turns.popleft()).done():
                    self.in_flight += 1
                    turn.set_result(None)
        self._check_empty()

    def _check_empty(self) -> None:
        if not self.in_flight and not self.fetching:
            self._empty.set()

    def leave(self, ahead: int, began_s: float) -> None:
        """End a request that began at ``began_s`` of the monotonic clock, as the ``ahead``-th in flight."""
        self._left()
        each_s = (time.monotonic() - began_s) / ahead
        self._each_s += (each_s - self._each_s) / (8 if self._each_s else 1)

    def drain(self) -> None:
        """Refuse all requests from now on."""
        self._draining = True

    async def drained(self) -> None:
        """Return once no request is in flight."""
        await self._empty.wait()


def _leaving() -> Unavailable:
    return Unavailable("the instance is draining", refused=True, refusal="leaving")
