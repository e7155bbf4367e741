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

from atserving.config import ACCEPT_KEY, DEFAULT_APP_METADATA_KEY, PREFIX

log = structlog.get_logger()

LEAST = 2
"""The deletion of fewer releases, or of fewer apps' rules of access, is not held back if it was seen to happen."""

WINDOW_S = 10.0
"""Keys that are deleted within so many seconds count together."""

_REMIND_S = 60.0
_RELEASES, _INSTANCES = f"{PREFIX}eval/", f"{PREFIX}instance/"
_RULES = (f"{PREFIX}app/metadata/", DEFAULT_APP_METADATA_KEY)


class Holdback:
    """Decides which deletions are taken now.

    It holds them back from the one on with which more than half of the releases, and at least LEAST, are deleted within
    WINDOW_S. Of what a snapshot lacks, half is enough, and one: nobody saw the deletions, and half of etcd may be
    restored. Rules of access count in the same way, since without them closed apps are open: who empties etcd key by
    key begins with them. It calls ``take`` with the keys once ``hold_s`` seconds have passed. 0: it holds back nothing.

    Instances come and go with their leases. The deletion of one waits only while that of its release does: without its
    release in etcd it cannot renew its lease.
    """

    def __init__(self, hold_s: float, take: Callable[[Set[str]], None]) -> None:
        self.held: set[str] = set()
        """The keys whose deletion is held back."""
        self._hold_s = hold_s
        self._take = take
        self._recent: deque[tuple[float, str]] = deque()
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def taken(
        self, known: Set[str], writes: Set[str], deletes: Set[str], *, snapshot: bool = False, vetted: bool = False
    ) -> Set[str]:
        """Return the deletions to take with a step, earlier ones included, and hold back the others.

        ``known`` are the keys before the step. The deletes of a ``snapshot`` are the keys that it lacks. Of a
        ``vetted`` step, which an operator made by a call or a registry has checked, only instances are held back: its
        sender may not know their releases.
        """
        was_held = bool(self.held)
        self.held -= writes
        if ACCEPT_KEY in writes or (ACCEPT_KEY in known and ACCEPT_KEY not in deletes):
            return deletes | self._end("an operator has accepted them")
        if vetted:
            self.held -= deletes
            self.held |= {key for key in deletes if _release_of(key) in self.held}
        elif self._holds(known, writes, deletes, snapshot):
            # The operator's word ends with its lease; held, it would count with the next step.
            self.held |= deletes - {ACCEPT_KEY}
        gone = {key for key in self.held if key.startswith(_INSTANCES) and _release_of(key) not in self.held}
        self.held -= gone
        taken = (deletes - self.held) | gone
        if self.held and not was_held:
            self._due_s = time.monotonic() + self._hold_s
            self._alarm()
        elif was_held and not self.held:
            self._end("their keys are back")
        return taken

    def _holds(self, known: Set[str], writes: Set[str], deletes: Set[str], snapshot: bool) -> bool:
        if any(key.startswith(_RELEASES) for key in self.held):
            return True
        vanished = {key for key in deletes & known if key.startswith((_RELEASES, *_RULES))}
        if not vanished or not self._hold_s:
            return False
        now_s = time.monotonic()
        while self._recent and self._recent[0][0] < now_s - WINDOW_S:
            self._recent.popleft()
        left = (known | writes) - vanished - self.held
        gone = vanished | self.held | {key for _, key in self._recent if key not in left}
        for kind in (_RELEASES, _RULES):
            if _number(vanished | self.held, kind) and _are_many(_number(gone, kind), _number(left, kind), snapshot):
                return True
        self._recent += [(now_s, key) for key in vanished]
        return False

    def _alarm(self) -> None:
        """Log what is held back, at once and then every minute, and take it in the end."""
        left_s = self._due_s - time.monotonic()
        if left_s <= 0:
            self._take(self._end(f"they were held back for {self._hold_s:g} s"))
            return
        log.error("deletions held", releases=_number(self.held, _RELEASES), keys=len(self.held), left_s=round(left_s))
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


def _are_many(gone: int, left: int, snapshot: bool) -> bool:
    """Return whether so many deletions are held back, beside so many keys that are left."""
    # To delete the old version of every app that has two is ordinary, and so is to delete the only release.
    return gone >= left if snapshot else gone > left and gone >= LEAST


def _number(keys: Set[str], kind: str | tuple[str, ...]) -> int:
    return sum(key.startswith(kind) for key in keys)


def _release_of(key: str) -> str:
    """Return the key of an instance's release; empty for another key."""
    return _RELEASES + key.removeprefix(_INSTANCES).rpartition("/")[0] if key.startswith(_INSTANCES) else ""
