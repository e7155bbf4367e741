"""How many requests an instance holds: one more is refused at once, and so is every one once it is leaving."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from atserving.errors import ResourceExhausted, Unavailable

_LEAST_RETRY_AFTER_S = 0.05


class Places:
    """A place for each request, from before it costs anything until it is answered. ``held <= most``, always.

    (Where ``most`` is lowered, those held may finish.)
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()
        # How long one request takes of those that are held together, in seconds, averaged over the last few.
        self._each_s = 0.0

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Raises ResourceExhausted where all places are taken, Unavailable while draining; both ``refused``."""
        if self._draining:
            raise Unavailable("the instance is leaving", refused=True)
        if self.held >= self.most:
            raise ResourceExhausted(
                f"the instance holds {self.held} requests, as many as it may",
                retry_after_s=max(self.held * self._each_s, _LEAST_RETRY_AFTER_S),
                refused=True,
            )
        self.held += 1
        ahead, began_s = self.held, time.monotonic()
        self._empty.clear()
        try:
            yield
        finally:
            self.held -= 1
            each_s = (time.monotonic() - began_s) / ahead
            self._each_s += (each_s - self._each_s) / (8 if self._each_s else 1)
            if not self.held:
                self._empty.set()

    def drain(self) -> None:
        """From now on ``hold`` refuses."""
        self._draining = True

    async def drained(self) -> None:
        """Returns once nothing is held."""
        await self._empty.wait()
