"""Keeps a view equal to the keys of etcd below ``/ava/serving/``, and a roster to its operators.

The view has neither these nor the history: gates and evaluators see all of it.

The mirror reads a snapshot at one revision and then watches all changes from the next revision on. After an
interruption it begins again and applies the difference as one step, so it need not ask whether etcd has compacted the
missed events or is another store now. A watch that resumed after the last event would not tell when it has caught up:
until then the view would pass for current, and followers would forget what it lacks. The view keeps the last known
config during an outage, and the mirror retries etcd without end.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import aclosing
from itertools import groupby

import structlog

from atserving.config import HISTORY, NOTE_KEY, OPERATORS, PREFIX, MalformedConfig, is_access_rules, read
from atserving.v1 import etcd_pb2
from registry.etcd import Compacted, EtcdClient, EtcdError
from registry.operators import Roster
from registry.view import Change, Delete, Put, View

log = structlog.get_logger()

_PAUSE_S = (0.1, 2.0)
_REMIND_S = 60.0
_HISTORY_STEPS = 16
_HISTORY, _NOTE, _INSTANCES = HISTORY.encode(), NOTE_KEY.encode(), f"{PREFIX}instance/".encode()
_OPERATORS = OPERATORS.encode()


class _StoreReplaced(Exception):  # noqa: N818 - control flow of this module
    """etcd is not the store that was mirrored: it was wiped or restored from a backup."""


class Mirror:
    """Mirrors etcd into a view and a roster."""

    def __init__(self, client: EtcdClient, view: View, roster: Roster | None = None) -> None:
        self.view = view
        self._roster = roster or Roster()
        self.reason = "no answer yet"
        """Why the watch of etcd is down; empty while it runs."""
        self.etcd_revision = 0
        """The revision of etcd, as far as it is known."""
        self.snapshots = self.steps = self.events = 0
        """How many snapshots, steps and events of etcd the view has taken."""
        self._current_s = time.monotonic()
        self._client = client
        self._log_again_at = 0.0

    async def run(self) -> None:
        """Mirror until cancelled."""
        pause_s = _PAUSE_S[0]
        while True:
            began = time.monotonic()
            try:
                await self._watch()
            except (Compacted, _StoreReplaced) as error:
                log.warning("etcd watch restarted", reason=str(error))
            except EtcdError as error:
                self._mark_lost(error)
            if time.monotonic() - began > _PAUSE_S[1]:
                pause_s = _PAUSE_S[0]
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads reconnects
            pause_s = min(pause_s * 2, _PAUSE_S[1])

    @property
    def lag_s(self) -> float:
        """The seconds since the last proof that the view is current: a snapshot, or a sign of life of the watch."""
        return time.monotonic() - self._current_s

    @property
    def malformed(self) -> int:
        """The number of keys with a malformed value."""
        return len(self.view.malformed) + len(self._roster.malformed)

    async def _watch(self) -> None:
        snapshot = await self._client.snapshot(PREFIX, without=HISTORY)
        puts: list[Put] = []
        for kv in snapshot.kvs:
            if not kv.key.startswith(_OPERATORS):
                puts += await self._last_good(kv)
                puts.append(_put(kv))
        self._roster.replace(kv for kv in snapshot.kvs if kv.key.startswith(_OPERATORS))
        self.view.replace(puts, snapshot.revision)
        self.snapshots += 1
        self._is_at(snapshot.revision)
        revision = snapshot.revision
        async with aclosing(self._client.watch(PREFIX, revision + 1, is_at=self._is_at)) as responses:
            async for response in responses:
                if response.header.cluster_id != snapshot.cluster_id or response.header.revision < revision:
                    raise _StoreReplaced("etcd is another store or an earlier state of this one")
                self._mark_watching()
                if response.events:
                    self._apply(response.events)
                    # The header's revision may be ahead of the events still to come.
                    revision = response.events[-1].kv.mod_revision
                self._is_at(response.header.revision)

    def _is_at(self, revision: int) -> None:
        """Take a proof that the view is current, and the revision of etcd."""
        self.etcd_revision = revision
        self._current_s = time.monotonic()

    def _apply(self, events: Sequence[etcd_pb2.Event]) -> None:
        """Apply events, those of an operator's calls apart from others."""
        if operators := [event for event in events if event.kv.key.startswith(_OPERATORS)]:
            self._roster.apply(operators)
        # Who empties etcd deletes the note, too.
        notes = (event for event in events if event.kv.key == _NOTE and event.type == etcd_pb2.Event.PUT)
        called = {event.kv.mod_revision for event in notes}
        for vetted, group in groupby(events, key=lambda event: event.kv.mod_revision in called):
            together = list(group)
            changes = [_change(event) for event in together if not event.kv.key.startswith((_HISTORY, _OPERATORS))]
            self.view.apply(changes, together[-1].kv.mod_revision, vetted=vetted)
            self.steps += 1
        self.events += len(events)

    async def _last_good(self, kv: etcd_pb2.KeyValue) -> list[Put]:
        """Return the last good value of a malformed key, if etcd still has it.

        With it, a registry that has just started serves the same value as one that saw the good value itself.
        """
        # Registries write instances, whose last value is of no use.
        if kv.key.startswith(_INSTANCES) or _is_well_formed(kv) or is_access_rules(_text(kv.key)):
            return []
        earlier: etcd_pb2.KeyValue | None = kv
        for _ in range(_HISTORY_STEPS):
            if earlier is None or earlier.version <= 1:
                return []
            try:
                earlier = await self._client.get(kv.key, earlier.mod_revision - 1)
            except Compacted:
                return []
            if earlier and _is_well_formed(earlier):
                return [_put(earlier)]
        return []

    def _mark_lost(self, error: EtcdError) -> None:
        now = time.monotonic()
        if now >= self._log_again_at:
            log.warning("etcd lost", reason=str(error), serving_last_known=self.view.synced.is_set())
            self._log_again_at = now + _REMIND_S
        self.reason = str(error)
        self.view.set_stale(True)

    def _mark_watching(self) -> None:
        if self.reason:
            log.info("etcd watch started", revision=self.view.revision, keys=len(self.view.entries))
            # Log the next outage at once, unless it follows within seconds.
            self._log_again_at = min(self._log_again_at, time.monotonic() + _PAUSE_S[1])
        self.reason = ""
        self.view.set_stale(False)


def _text(key: bytes) -> str:
    # No key of ours is invalid UTF-8, but such a key needs a name in the list of malformed keys.
    return key.decode(errors="backslashreplace")


def _change(event: etcd_pb2.Event) -> Change:
    return Delete(_text(event.kv.key)) if event.type == etcd_pb2.Event.DELETE else _put(event.kv)


def _put(kv: etcd_pb2.KeyValue) -> Put:
    return Put(_text(kv.key), kv.value, kv.create_revision, kv.mod_revision, kv.lease)


def _is_well_formed(kv: etcd_pb2.KeyValue) -> bool:
    try:
        read(_text(kv.key), kv.value)
    except MalformedConfig:
        return False
    return True
