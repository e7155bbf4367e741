"""Keeps a view equal to what etcd holds below ``/ava/serving/``.

A snapshot at one revision, then every change from the next revision on. A broken stream is taken up after the last
event applied; where that can't be (compacted away, or etcd is no longer the store it was) a fresh snapshot is compared
with what is known. Whatever happens, what is known stays, and etcd is tried again for ever.
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
    """Up to where the store was mirrored; advanced by events alone, never by what a header says."""

    cluster_id: int
    revision: int


class _OtherStore(Exception):  # noqa: N818 - control flow of this module
    """etcd is not the store that was mirrored: wiped, or restored from a backup."""


class Mirror:
    """Follows etcd for a view."""

    def __init__(self, client: EtcdClient, view: View) -> None:
        self.view = view
        self.reason = "it has not answered yet"
        """Why etcd can't be followed just now; empty: it is followed."""
        self._client = client
        self._position: _Position | None = None
        self._written: dict[bytes, int] = {}
        self._log_again_at = 0.0

    async def run(self) -> None:
        """Follows until cancelled."""
        pause_s = _PAUSE_S[0]
        while True:
            began = time.monotonic()
            try:
                await self._follow()
            except (Compacted, FutureRevision, _OtherStore) as error:
                log.warning("etcd watch restarted", reason=str(error))
                self._position = None
            except EtcdError as error:
                self._lost(error)
            if time.monotonic() - began > _PAUSE_S[1]:
                pause_s = _PAUSE_S[0]
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads reconnects
            pause_s = min(pause_s * 2, _PAUSE_S[1])

    async def _follow(self) -> None:
        position = await self._resumable() or await self._snapshot()
        async with aclosing(self._client.watch(PREFIX, position.revision + 1)) as responses:
            async for response in responses:
                header = response.header
                if header.cluster_id != position.cluster_id or header.revision < position.revision:
                    raise _OtherStore("etcd is another store, or went back to an earlier state")
                self._found()
                if response.events:
                    self._apply(response.events)
                    # The header may be ahead of the events; what is still to come must not be skipped.
                    position = _Position(position.cluster_id, response.events[-1].kv.mod_revision)
                    self._position = position

    async def _resumable(self) -> _Position | None:
        """The position, once etcd has shown that it still is the store that was mirrored up to it."""
        position = self._position
        if position is None or not self._written:
            return None
        # A store wiped and filled again may have the same cluster_id and a higher revision, but not the same history.
        key, mod_revision = max(self._written.items(), key=lambda item: item[1])
        kv = await self._client.get(key, position.revision)
        if kv is None or kv.mod_revision != mod_revision:
            raise _OtherStore("etcd has another history")
        return position

    async def _snapshot(self) -> _Position:
        snapshot = await self._client.snapshot(PREFIX)
        puts: list[Put] = []
        for kv in snapshot.kvs:
            puts += await self._earlier_good(kv)
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

    async def _earlier_good(self, kv: etcd_pb2.KeyValue) -> list[Put]:
        """The last good value of a key that is malformed now, as far as etcd still has it and the view doesn't.

        So a registry that starts anew serves what those serve that saw the good value themselves.
        """
        known = self.view.entries.get(_text(kv.key))
        if _is_good(kv) or (known and known.created == kv.create_revision):
            return []
        earlier: etcd_pb2.KeyValue | None = kv
        for _ in range(_HISTORY_STEPS):
            if earlier is None or earlier.version <= 1:
                return []
            try:
                earlier = await self._client.get(kv.key, earlier.mod_revision - 1)
            except Compacted:
                return []
            if earlier and _is_good(earlier):
                return [_put(earlier)]
        return []

    def _lost(self, error: EtcdError) -> None:
        now = time.monotonic()
        if now >= self._log_again_at:
            log.warning("etcd lost", reason=str(error), serving_last_known=self.view.synced.is_set())
            self._log_again_at = now + _REMIND_S
        self.reason = str(error)
        self.view.set_stale(True)

    def _found(self) -> None:
        if self.reason:
            log.info("etcd watch started", revision=self.view.revision, keys=len(self.view.entries))
            # The next outage is told at once, but for one that follows on the heels of this one.
            self._log_again_at = min(self._log_again_at, time.monotonic() + _PAUSE_S[1])
        self.reason = ""
        self.view.set_stale(False)


def _text(key: bytes) -> str:
    # A key that is no UTF-8 is none of ours; it must still have a name under which it is reported.
    return key.decode(errors="backslashreplace")


def _put(kv: etcd_pb2.KeyValue) -> Put:
    return Put(_text(kv.key), kv.value, kv.create_revision)


def _is_good(kv: etcd_pb2.KeyValue) -> bool:
    try:
        parse(_text(kv.key), kv.value)
    except MalformedConfig:
        return False
    return True
