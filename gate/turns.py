"""Gives each app its turn while a gate has more requests than it can pass on in one step of its loop.

A few requests of each step go at once, in the order of their arrival. The others wait, those of each app in a queue of
their own, and the apps take turns: one request each. So an app that floods a gate waits for itself.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

AT_ONCE = 32
"""How many requests a step passes on as they come: about 2 ms of work."""

NEXT = 16
"""How many of those that wait a step passes on."""

MOST_WAITING = 1024
"""How many requests of an app may wait. More are refused at once, which costs less."""


class Turns:
    """The requests that wait for their turn, by whose they are."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._count = 0
        self._next_step = self._begin_step
        self._waiting: dict[str, deque[Callable[[], None]]] = {}
        self._order: deque[str] = deque()
        self._goes_on = False
        self.waited = self.refused = 0
        """How many requests have had to wait, and how many were too many to wait."""

    def __len__(self) -> int:
        """Return how many requests wait."""
        return sum(map(len, self._waiting.values()))

    def is_free(self) -> bool:
        """Return whether a request may go at once, and count it."""
        if self._order:
            return False
        if not self._count:
            self._loop.call_soon(self._next_step)
        self._count += 1
        return self._count <= AT_ONCE

    def _begin_step(self) -> None:
        self._count = 0

    def refuses(self, owner: str) -> bool:
        """Return whether as many requests of an owner wait as may, and count one that is refused for it."""
        waiting = self._waiting.get(owner)
        if waiting is None or len(waiting) < MOST_WAITING:
            return False
        self.refused += 1
        return True

    def wait(self, owner: str, begin: Callable[[], None]) -> None:
        """Call ``begin`` when it is the owner's turn."""
        self.waited += 1
        waiting = self._waiting.get(owner)
        if waiting is None:
            waiting = self._waiting[owner] = deque()
            self._order.append(owner)
        waiting.append(begin)
        self._go_on_soon()

    def _go_on_soon(self) -> None:
        if not self._goes_on:
            self._goes_on = True
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Begin some requests, one of each owner after another."""
        self._goes_on = False
        try:
            for _ in range(NEXT):
                if not self._order:
                    return
                owner = self._order.popleft()
                waiting = self._waiting[owner]
                begin = waiting.popleft()
                if waiting:
                    self._order.append(owner)
                else:
                    del self._waiting[owner]
                begin()
        finally:
            if self._order:
                # What has arrived meanwhile finds its place first.
                self._go_on_soon()
