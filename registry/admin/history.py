"""The history of the config: one entry for each transaction and app, kept in etcd.

A change through the API leaves a note of who made it and why, in its own transaction. A recorder in every registry
watches the config and writes an entry for each change, with what the keys held before: so changes by other tools get
one, too, and nobody has to hold a lock. The key of an entry names the revision of its change, and the first recorder to
write it wins. If that key holds an entry which was copied from another etcd, the next free one does.

:data:`SEEN_KEY` holds the last revision that was recorded. A recorder goes on there after an outage. If etcd has
compacted what it missed by then, the entries of keys that were written meanwhile lack the earlier values.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import aclosing, suppress
from typing import Any

import msgspec
import orjson
import structlog

from atserving.config import ACCEPT_KEY, HISTORY, NOTE_KEY, OPERATORS, PREFIX, MalformedConfig, app_of
from atserving.v1 import etcd_pb2
from registry.etcd import Compacted, EtcdClient, EtcdError, EtcdRefused, LeaseNotFound, delete, put, written_at
from registry.etcd.errors import OutOfSpace, TokenRefused
from registry.operators.roster import without_secrets

log = structlog.get_logger()

SEEN_KEY = f"{HISTORY}.seen"

NO_APP = "-"

OPERATORS_APP = "@operators"
"""Stands for an app in the changes of who may operate: they have a history of their own, which nothing rolls back."""

_MOST_BYTES = 512 << 10
_MOST_KEY_CHARS = 300
_PAUSE_S = (0.1, 2.0)
_SEEN_S = 10.0
_FULL_S = 1.0
_IGNORED = (f"{PREFIX}instance/", f"{PREFIX}deletions/", HISTORY)


class KeyChange(msgspec.Struct, frozen=True, omit_defaults=True):
    """The value of a key before and after; None: there was none, or is none."""

    key: str
    before: str | None = None
    after: str | None = None
    omitted: bool = False
    """The values are too large to keep, or were compacted."""


class Change(msgspec.Struct, frozen=True, omit_defaults=True):
    """One transaction on the config of one app (empty: the defaults)."""

    revision: int
    app: str
    time: float
    """Seconds since 1970."""
    keys: tuple[KeyChange, ...]
    actor: str = ""
    method: str = ""
    """Empty: it was not made through the API."""
    message: str = ""
    proven: bool = False
    """Whether somebody has checked who the actor is."""
    created: int = 0
    """The revision that wrote the entry, which orders them."""


class Note(msgspec.Struct, frozen=True):
    """The value of NOTE_KEY."""

    actor: str = ""
    method: str = ""
    message: str = ""
    time: float = 0.0
    proven: bool = False


class History:
    """Reads the entries."""

    def __init__(self, client: EtcdClient) -> None:
        self._client = client

    async def newest(self, app: str, limit: int, before: int = 0) -> list[Change]:
        """Return the newest changes of an app (``-``: of all apps), recorded before a revision. Raises EtcdError."""
        prefix = HISTORY if app == NO_APP else _prefix(app)
        kvs = await self._client.newest(prefix, limit + 2, before)
        found = [msgspec.structs.replace(_read(kv), created=kv.create_revision) for kv in kvs if _is_entry(kv)]
        return found[:limit]

    async def since(self, app: str, revision: int) -> list[Change]:
        """Return the changes of an app from a revision on, the newest first. Raises EtcdError."""
        kvs, _ = await self._client.get_below([_prefix(app)], [])
        # Entries that were copied from another etcd have its revisions.
        kvs = sorted(kvs, key=lambda kv: -kv.create_revision)
        first = next((kv.create_revision for kv in kvs if _read(kv).revision == revision), None)
        return [_read(kv) for kv in kvs if first is not None and kv.create_revision >= first]


class Recorder:
    """Writes the entries, and keeps at most ``most`` of an app, none older than ``age_s``."""

    def __init__(self, client: EtcdClient, most: int, age_s: float) -> None:
        self._client = client
        self._most = most
        self._age_s = age_s
        self.revision = 0
        """The last revision that was recorded, here or elsewhere."""
        self.written = 0
        """How many entries this recorder has written."""
        self.entry_s: float | None = None
        """When the last entry was written here, in seconds since 1970."""
        self._step = asyncio.Event()
        self._saved_s = 0.0

    async def reached(self, revision: int) -> None:
        """Wait until the changes up to a revision are recorded."""
        while self.revision < revision:
            await self._step.wait()

    async def run(self) -> None:
        """Record until cancelled."""
        pause_s = _PAUSE_S[0]
        while True:
            began = time.monotonic()
            try:
                await self._follow()
            except Compacted:
                with suppress(EtcdError):
                    await self._catch_up()
            except EtcdError as error:
                # The mirror says so, too.
                log.debug("history delayed", reason=str(error))
            if time.monotonic() - began > _PAUSE_S[1]:
                pause_s = _PAUSE_S[0]
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads reconnects
            pause_s = min(pause_s * 2, _PAUSE_S[1])

    async def _follow(self) -> None:
        seen, now = await self._seen()
        if seen is None or seen > now:
            # The first recorder of this store, or etcd is an earlier state of it.
            seen = now
            await self._client.put(SEEN_KEY, str(seen))
        # Not what it was in another store.
        self.revision = 0
        self._reach(seen)
        changes = self._client.watch(PREFIX, seen + 1, before=True)
        async with aclosing(changes) as responses:
            async for response in responses:
                for revision, events in _by_revision(response.events):
                    await self._record(revision, events)
                if response.events:
                    await self._save(response.events[-1].kv.mod_revision)

    async def _seen(self) -> tuple[int | None, int]:
        """Return the last recorded revision, None if there is none, and the present one."""
        kvs, now = await self._client.get_below([], [SEEN_KEY])
        text = kvs[0].value.decode(errors="replace") if kvs else ""
        return (int(text) if text.isdecimal() else None), now

    async def _record(self, revision: int, events: Sequence[etcd_pb2.Event]) -> None:
        note = Note()
        changed: dict[str, list[KeyChange]] = {}
        for event in events:
            key = event.kv.key.decode(errors="backslashreplace")
            if key == NOTE_KEY:
                with suppress(msgspec.DecodeError, msgspec.ValidationError):
                    note = msgspec.json.decode(event.kv.value, type=Note)
            elif key == ACCEPT_KEY and event.type == etcd_pb2.Event.PUT:
                # Nothing takes it back.
                changed.setdefault("", []).append(KeyChange(key, None, _text(event.kv.value)))
            elif not key.startswith(_IGNORED):
                is_put = event.type == etcd_pb2.Event.PUT
                before = event.prev_kv.value if event.HasField("prev_kv") else None
                after = event.kv.value if is_put else None
                if before is None and not (is_put and event.kv.version == 1):
                    # etcd has compacted it.
                    changed.setdefault(_app(key), []).append(KeyChange(key[:_MOST_KEY_CHARS], omitted=True))
                elif before != after:
                    changed.setdefault(_app(key), []).append(_changed(key, before, after))
        for number, (app, keys) in enumerate(changed.items()):
            by_key = tuple(sorted(keys, key=lambda each: each.key))
            moment_s = note.time or time.time()
            entry = Change(revision, app, moment_s, by_key, note.actor, note.method, note.message, note.proven)
            await self._keep(entry, seen=number == len(changed) - 1)
        self._reach(revision)

    async def _keep(self, change: Change, *, seen: bool) -> None:
        """Write an entry, unless there is one. ``seen``: it is the last one of its revision."""
        key = _key(change.app, change.revision)
        value = msgspec.json.encode(change)
        if len(value) > _MOST_BYTES:
            keys = tuple(KeyChange(each.key, omitted=True) for each in change.keys)
            value = msgspec.json.encode(msgspec.structs.replace(change, keys=keys))
        marks = [put(SEEN_KEY, str(change.revision))] if seen else []
        try:
            while await self._commit(key, [put(key, value.decode()), *marks]) is None:
                # Another recorder has written it, or no answer came.
                if stored := await self._client.get(key):
                    if not _is_of_another_etcd(_read(stored), change):
                        return
                    key += "+"
        except (LeaseNotFound, Compacted, TokenRefused):
            raise
        except EtcdRefused as error:
            log.warning("history incomplete", reason=f"etcd refuses change {change.revision}: {error}"[:300])
            return
        self.written += 1
        self.entry_s = time.time()
        await self._prune(change.app)

    async def _commit(self, key: str, operations: Sequence[etcd_pb2.RequestOp]) -> int | None:
        """Write an entry that is not there yet, once etcd has room for it."""
        told = False
        while True:
            try:
                return await self._client.commit([written_at(key, 0)], operations)
            except OutOfSpace as error:
                # Whoever frees it may compact the change, too: it is kept here.
                if not told:
                    log.warning("history waiting", reason=str(error))
                    told = True
                await asyncio.sleep(_FULL_S)

    async def _prune(self, app: str) -> None:
        """Delete the entries of an app that are too many or too old."""
        first, count = await self._client.oldest(_prefix(app), 1)
        old_s = time.time() - self._age_s
        if count <= self._most and not (first and _read(first[0]).time < old_s):
            return
        surplus = max(count - self._most, 0)
        kvs, _ = await self._client.oldest(_prefix(app), max(surplus, 20))
        gone = [kv for number, kv in enumerate(kvs) if number < surplus or _read(kv).time < old_s]
        await self._client.txn([], [delete(kv.key.decode()) for kv in gone[:100]])

    async def _save(self, revision: int) -> None:
        """Save how far the recording has come, now and then: instances come and go without entries."""
        self._reach(revision)
        now_s = time.monotonic()
        if now_s - self._saved_s > _SEEN_S:
            self._saved_s = now_s
            with suppress(OutOfSpace):
                await self._client.put(SEEN_KEY, str(revision))

    async def _catch_up(self) -> None:
        """Record what is left of the changes that were compacted: the keys that were written since."""
        seen, _ = await self._seen()
        snapshot = await self._client.snapshot(PREFIX, without=HISTORY)
        log.warning("history incomplete", reason="etcd has compacted changes that no registry has seen")
        written: dict[tuple[str, int], list[KeyChange]] = {}
        for kv in snapshot.kvs:
            key = kv.key.decode(errors="backslashreplace")
            if kv.mod_revision > (seen or 0) and not key.startswith(_IGNORED):
                change = msgspec.structs.replace(_changed(key, None, kv.value), omitted=True)
                written.setdefault((_app(key), kv.mod_revision), []).append(change)
        for (app, revision), keys in sorted(written.items(), key=lambda each: each[0][1]):
            await self._keep(Change(revision, app, time.time(), tuple(keys)), seen=False)
        # Nobody knows which keys were deleted: no way leads back behind this.
        kvs, _ = await self._client.get_below([HISTORY], [])
        for app in {kv.key.decode(errors="replace").removeprefix(HISTORY).split("/")[0] for kv in kvs if _is_entry(kv)}:
            unknown = (KeyChange("", omitted=True),)
            name = "" if app == NO_APP else app
            if (name, snapshot.revision) not in written:
                await self._keep(Change(snapshot.revision, name, time.time(), unknown), seen=False)
        await self._client.put(SEEN_KEY, str(snapshot.revision))

    def _reach(self, revision: int) -> None:
        self.revision = max(self.revision, revision)
        self._step.set()
        self._step = asyncio.Event()


def _by_revision(events: Iterable[etcd_pb2.Event]) -> Iterator[tuple[int, list[etcd_pb2.Event]]]:
    by_revision: dict[int, list[etcd_pb2.Event]] = {}
    for event in events:
        by_revision.setdefault(event.kv.mod_revision, []).append(event)
    yield from by_revision.items()


def _changed(key: str, before: bytes | None, after: bytes | None) -> KeyChange:
    name = key[:_MOST_KEY_CHARS]
    if not key.startswith(OPERATORS):
        return KeyChange(name, _text(before), _text(after))
    (old, old_malformed), (new, new_malformed) = without_secrets(key, before), without_secrets(key, after)
    return KeyChange(name, old, new, old_malformed or new_malformed)


def _app(key: str) -> str:
    if key.startswith(OPERATORS):
        return OPERATORS_APP
    with suppress(MalformedConfig):
        return app_of(key) or ""
    return ""


def _prefix(app: str) -> str:
    return f"{HISTORY}{app or NO_APP}/"


def _key(app: str, revision: int) -> str:
    # Sorted as the revisions are.
    return f"{_prefix(app)}{revision:020d}"


def _is_entry(kv: etcd_pb2.KeyValue) -> bool:
    return kv.key not in (SEEN_KEY.encode(), NOTE_KEY.encode())


def _read(kv: etcd_pb2.KeyValue) -> Change:
    try:
        return msgspec.json.decode(kv.value, type=Change)
    except (msgspec.DecodeError, msgspec.ValidationError):
        # Somebody else has written it.
        *_, app, revision = kv.key.decode(errors="replace").split("/")
        return Change(int(revision) if revision.isdecimal() else 0, app, 0.0, ())


def _is_of_another_etcd(stored: Change, change: Change) -> bool:
    """Return whether an entry was copied from an etcd in which its revision was another change."""
    return stored.keys != change.keys and not any(each.omitted for each in (*stored.keys, *change.keys))


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode(errors="backslashreplace")


def as_json(text: str | None) -> Any:
    """Return a value as JSON; its text if it is none."""
    try:
        return None if text is None else orjson.loads(text)
    except orjson.JSONDecodeError:
        return text
