"""Holds back the deletion of most releases: an emptied etcd looks like the wish to stop every app.

A registry holds back deletions in etcd. A gate holds back what a new snapshot lacks, since the registry that sends it
may have started after etcd was emptied. The held keys stay in use until somebody writes them again, an operator
accepts the deletions, or the time is over.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Set

import structlog

from atserving.config import ACCEPT_KEY, PREFIX

log = structlog.get_logger()

LEAST = 2
"""The deletion of fewer releases, or of fewer apps' rules of access, is never held back."""

WINDOW_S = 10.0
"""Keys that are deleted within so many seconds count together."""

_REMIND_S = 60.0
_RELEASES, _RULES, _INSTANCES = f"{PREFIX}eval/", f"{PREFIX}app/", f"{PREFIX}instance/"


class Holdback:
    """Decides which deletions are taken now.

    It holds them back from the one on with which more than half of the releases, and at least LEAST, are deleted within
    WINDOW_S. Rules of access count in the same way, since without them closed apps are open: who empties etcd key by
    key begins with them. It calls ``take`` with the keys once ``hold_s`` seconds have passed. 0: it holds back nothing.
    """

    def __init__(self, hold_s: float, take: Callable[[Set[str]], None]) -> None:
        self.held: set[str] = set()
        """The keys whose deletion is held back."""
        self._hold_s = hold_s
        self._take = take
        self._recent: deque[tuple[float, str]] = deque()
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def taken(self, known: Set[str], writes: Set[str], deletes: Set[str], *, vetted: bool = False) -> Set[str]:
        """Return the deletions to take with a step, earlier ones included, and hold back the others.

        ``known`` are the keys before the step. Nothing of a ``vetted`` step is held back.
        """
        was_held = bool(self.held)
        self.held -= writes
        if ACCEPT_KEY in writes or (ACCEPT_KEY in known and ACCEPT_KEY not in deletes):
            return deletes | self._end("an operator has accepted them")
        if vetted:
            self.held -= deletes
            taken = deletes
        elif self._holds(known, writes, deletes):
            # The operator's word ends with its lease; held, it would count with the next step.
            taken = deletes & {ACCEPT_KEY}
            self.held |= deletes - taken
        else:
            # Rules of access may be written after the releases, but an instance that has not come back is gone.
            taken = deletes | {key for key in self.held if key.startswith(_INSTANCES)}
            self.held -= taken
        if self.held and not was_held:
            self._due_s = time.monotonic() + self._hold_s
            self._alarm()
        elif was_held and not self.held:
            self._end("their keys are back")
        return taken

    def _holds(self, known: Set[str], writes: Set[str], deletes: Set[str]) -> bool:
        if any(key.startswith(_RELEASES) for key in self.held):
            return True
        vanished = {key for key in deletes if key.startswith((_RELEASES, _RULES))}
        if not vanished or not self._hold_s:
            return False
        now_s = time.monotonic()
        while self._recent and self._recent[0][0] < now_s - WINDOW_S:
            self._recent.popleft()
        left = (known | writes) - vanished - self.held
        gone = vanished | self.held | {key for _, key in self._recent if key not in left}
        if _most(gone, left, _RELEASES) or _most(gone, left, _RULES):
            return True
        self._recent += [(now_s, key) for key in vanished]
        return False

    def _alarm(self) -> None:
        """Log what is held back, at once and then every minute, and take it in the end."""
        left_s = self._due_s - time.monotonic()
        if left_s <= 0:
            self._take(self._end(f"they were held back for {self._hold_s:g} s"))
            return
        releases = sum(key.startswith(_RELEASES) for key in self.held)
        log.error("deletions held", releases=releases, keys=len(self.held), left_s=round(left_s))
        self._timer = asyncio.get_running_loop().call_later(min(left_s, _REMIND_S), self._alarm)

    def _end(self, reason: str) -> Set[str]:
        """Hold back nothing more; return what was held back."""
        held, self.held = self.held, set()
        self._recent.clear()
        if self._timer:
            self._timer.cancel()
            self._timer = None
            log.warning("deletions no longer held", reason=reason)
        return held


def _most(gone: Set[str], left: Set[str], kind: str) -> bool:
    """Return whether most keys of a kind are gone."""
    number = sum(key.startswith(kind) for key in gone)
    return number >= LEAST and number > sum(key.startswith(kind) for key in left)
