"""Keeps a view equal to the keys of etcd below ``/ava/serving/``.

The mirror reads a snapshot at one revision and then watches all changes from the next revision on. After an
interruption it resumes behind the last event that it applied. If etcd has compacted those revisions or is another store
now, the mirror reads a new snapshot and applies the difference. The view keeps the last known config during an outage,
and the mirror retries etcd without end.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

import structlog

from atserving.config import PREFIX, MalformedConfig, parse
from atserving.v1 import etcd_pb2
from registry.etcd import Compacted, EtcdClient, EtcdError, FutureRevision
from registry.view import Change, Delete, Put, View

log = structlog.get_logger()

_PAUSE_S = (0.1, 2.0)
_REMIND_S = 60.0
_HISTORY_STEPS = 16


@dataclass(frozen=True)
class _Position:
    """The last revision that was applied. Only events advance it, never the revision in a header."""

    cluster_id: int
    revision: int


class _StoreReplaced(Exception):  # noqa: N818 - control flow of this module
    """etcd is not the store that was mirrored: it was wiped or restored from a backup."""


class Mirror:
    """Mirrors etcd into a view."""

    def __init__(self, client: EtcdClient, view: View) -> None:
        self.view = view
        self.reason = "no answer yet"
        """Why the watch of etcd is down; empty while it runs."""
        self._client = client
        self._position: _Position | None = None
        self._written: dict[bytes, int] = {}
        self._log_again_at = 0.0

    async def run(self) -> None:
        """Mirror until cancelled."""
        pause_s = _PAUSE_S[0]
        while True:
            began = time.monotonic()
            try:
                await self._watch()
            except (Compacted, FutureRevision, _StoreReplaced) as error:
                log.warning("etcd watch restarted", reason=str(error))
                self._position = None
            except EtcdError as error:
                self._mark_lost(error)
            if time.monotonic() - began > _PAUSE_S[1]:
                pause_s = _PAUSE_S[0]
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads reconnects
            pause_s = min(pause_s * 2, _PAUSE_S[1])

    async def _watch(self) -> None:
        position = await self._resumable() or await self._snapshot()
        async with aclosing(self._client.watch(PREFIX, position.revision + 1)) as responses:
            async for response in responses:
                header = response.header
                if header.cluster_id != position.cluster_id or header.revision < position.revision:
                    raise _StoreReplaced("etcd is another store or an earlier state of this one")
                self._mark_watching()
                if response.events:
                    self._apply(response.events)
                    # The header's revision may be ahead of the events; taking it would skip events still to come.
                    position = _Position(position.cluster_id, response.events[-1].kv.mod_revision)
                    self._position = position

    async def _resumable(self) -> _Position | None:
        """Return the position, if etcd still is the store that was mirrored up to it. Raises _StoreReplaced."""
        position = self._position
        if position is None or not self._written:
            return None
        # A wiped and refilled store may have the same cluster_id and a higher revision, but its history differs.
        key, mod_revision = max(self._written.items(), key=lambda item: item[1])
        kv = await self._client.get(key, position.revision)
        if kv is None or kv.mod_revision != mod_revision:
            raise _StoreReplaced("etcd has a different history")
        return position

    async def _snapshot(self) -> _Position:
        snapshot = await self._client.snapshot(PREFIX)
        puts: list[Put] = []
        for kv in snapshot.kvs:
            puts += await self._last_good(kv)
            puts.append(_put(kv))
        self.view.replace(puts, snapshot.revision)
        self._written = {kv.key: kv.mod_revision for kv in snapshot.kvs}
        self._position = _Position(snapshot.cluster_id, snapshot.revision)
        return self._position

    def _apply(self, events: Sequence[etcd_pb2.Event]) -> None:
        changes: list[Change] = []
        for event in events:
            if event.type == etcd_pb2.Event.DELETE:
                changes.append(Delete(_text(event.kv.key)))
                self._written.pop(event.kv.key, None)
            else:
                changes.append(_put(event.kv))
                self._written[event.kv.key] = event.kv.mod_revision
        self.view.apply(changes, events[-1].kv.mod_revision)

    async def _last_good(self, kv: etcd_pb2.KeyValue) -> list[Put]:
        """Return the last good value of a malformed key, if etcd still has it and the view does not.

        With it, a registry that has just started serves the same value as one that saw the good value itself.
        """
        known = self.view.entries.get(_text(kv.key))
        if _is_well_formed(kv) or (known and known.created == kv.create_revision):
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


def _put(kv: etcd_pb2.KeyValue) -> Put:
    return Put(_text(kv.key), kv.value, kv.create_revision)


def _is_well_formed(kv: etcd_pb2.KeyValue) -> bool:
    try:
        parse(_text(kv.key), kv.value)
    except MalformedConfig:
        return False
    return True
