"""Bounds the requests in flight in an instance, and refuses the rest at once; while draining, it refuses all."""

from __future__ import annotations

import asyncio
import time

from atserving.errors import ResourceExhausted, Unavailable

_LEAST_RETRY_AFTER_S = 0.05


class Capacity:
    """Counts requests from their arrival to their reply; ``in_flight`` never exceeds ``limit``.

    After the limit is lowered, requests in flight may still finish.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()
        # The seconds per request in flight, averaged over the last few: it predicts when capacity is free again.
        self._each_s = 0.0

    def enter(self) -> int:
        """Count one request; return how many are in flight now.

        Raises ResourceExhausted at the limit, Unavailable while draining; both ``refused``.
        """
        if self._draining:
            raise Unavailable("the instance is draining", refused=True)
        if self.in_flight >= self.limit:
            raise ResourceExhausted(
                f"the instance has {self.in_flight} requests in flight, which is its limit",
                retry_after_s=max(self.in_flight * self._each_s, _LEAST_RETRY_AFTER_S),
                refused=True,
            )
        self.in_flight += 1
        if self.in_flight == 1:
            self._empty.clear()
        return self.in_flight

    def leave(self, ahead: int, began_s: float) -> None:
        """End a request that began at ``began_s`` of the monotonic clock, as the ``ahead``-th in flight."""
        self.in_flight -= 1
        each_s = (time.monotonic() - began_s) / ahead
        self._each_s += (each_s - self._each_s) / (8 if self._each_s else 1)
        if not self.in_flight:
            self._empty.set()

    def drain(self) -> None:
        """Refuse all requests from now on."""
        self._draining = True

    async def drained(self) -> None:
        """Return once no request is in flight."""
        await self._empty.wait()
