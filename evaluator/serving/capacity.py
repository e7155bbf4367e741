"""How many requests an instance holds: one more is refused at once, and so is every one once it is leaving."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from atserving.errors import ResourceExhausted, Unavailable

_LEAST_RETRY_AFTER_S = 0.05


class Capacity:
    """A place for each request, from before it costs anything until it is answered. ``held <= limit``, always.

    (Where ``most`` is lowered, those held may finish.)
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()
        # How long one request takes of those that are held together, in seconds, averaged over the last few.
        self._each_s = 0.0

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Raises ResourceExhausted where all capacity are taken, Unavailable while draining; both ``refused``."""
        if self._draining:
            raise Unavailable("the instance is leaving", refused=True)
        if self.in_flight >= self.limit:
            raise ResourceExhausted(
                f"the instance holds {self.in_flight} requests, as many as it may",
                retry_after_s=max(self.in_flight * self._each_s, _LEAST_RETRY_AFTER_S),
                refused=True,
            )
        self.in_flight += 1
        ahead, began_s = self.in_flight, time.monotonic()
        self._empty.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            each_s = (time.monotonic() - began_s) / ahead
            self._each_s += (each_s - self._each_s) / (8 if self._each_s else 1)
            if not self.in_flight:
                self._empty.set()

    def drain(self) -> None:
        """From now on ``hold`` refuses."""
        self._draining = True

    async def drained(self) -> None:
        """Returns once nothing is held."""
        await self._empty.wait()
