"""Holds requests for versions without a ready instance until one may be ready.

Nothing here runs while every version has an instance.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection

from atserving import config

MOST_WAITING = 1024
"""How many requests wait in a gate."""

MOST_OF_APP = 256
"""How many of those are of one app."""

MOST_BYTES = 32 << 20
"""How many bytes those that wait have."""

MOST_BYTES_OF_APP = MOST_BYTES // 2
"""How many of those are of one app."""


_MANY_KEYS = 1000


class Waiting:
    """The requests that wait for an instance, by app. A change of the config of their app wakes them."""

    def __init__(self) -> None:
        self._wakers: dict[str, dict[asyncio.Future[None], int]] = {}
        self._bytes: Counter[str] = Counter()
        self._all_bytes = self._count = 0

    def __len__(self) -> int:
        """Return how many requests wait."""
        return self._count

    def has_room(self, app: str, size: int) -> bool:
        """Return whether one more request of an app, of so many bytes, may wait."""
        return (
            self._count < MOST_WAITING
            and len(self._wakers.get(app, ())) < MOST_OF_APP
            and self._all_bytes + size <= MOST_BYTES
            and self._bytes[app] + size <= MOST_BYTES_OF_APP
        )

    async def wait(self, app: str, size: int, seconds: float) -> None:
        """Wait until the config of an app changes, but only so long."""
        loop = asyncio.get_running_loop()
        waker: asyncio.Future[None] = loop.create_future()
        # A timeout of asyncio's would need a task.
        timer = loop.call_later(seconds, _wake, waker)
        self._count_one(app, waker, size)
        try:
            await waker
        finally:
            timer.cancel()
            self._forget_one(app, waker)

    def _count_one(self, app: str, waker: asyncio.Future[None], size: int) -> None:
        self._wakers.setdefault(app, {})[waker] = size
        self._bytes[app] += size
        self._all_bytes += size
        self._count += 1

    def _forget_one(self, app: str, waker: asyncio.Future[None]) -> None:
        size = self._wakers[app].pop(waker)
        self._bytes[app] -= size
        self._all_bytes -= size
        self._count -= 1
        if not self._wakers[app]:
            del self._wakers[app], self._bytes[app]

    def wake(self, keys: Collection[str]) -> None:
        """Wake the requests of the apps to which these keys of the config belong, in the order of their arrival."""
        apps: set[str | None] = {None} if len(keys) > _MANY_KEYS else {_app_of(key) for key in keys}
        for app, wakers in self._wakers.items():
            if app in apps or None in apps:
                for waker in wakers:
                    _wake(waker)


def _app_of(key: str) -> str | None:
    """Return the app of a key; None if it may concern all apps."""
    return config.app_of(key) if config.is_known(key) else None


def _wake(waker: asyncio.Future[None]) -> None:
    if not waker.done():
        waker.set_result(None)
