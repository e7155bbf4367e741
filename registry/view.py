"""The config as it stands, and its subscribers.

What holds at any time: ``entries`` is what the store held at ``revision``, with every value well-formed; a key whose
value is not is in ``malformed``, and keeps the last good value it had since it was created. What a subscriber was
given, applied in order, is what ``entries`` was at the last step it was given. No subscriber is waited for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import structlog

from atserving.config import ConfigValue, MalformedConfig, app_of, parse

log = structlog.get_logger()

QUEUE_DELTAS = 256
"""How many steps a subscriber may be behind before it is given everything anew."""


@dataclass(frozen=True, slots=True)
class Put:
    """A key was written; ``created`` is the revision at which it came into being."""

    key: str
    value: bytes
    created: int


@dataclass(frozen=True, slots=True)
class Delete:
    """A key was deleted, or its lease expired."""

    key: str


Change = Put | Delete


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's last good value, as it is stored and as it is read."""

    value_json: str
    value: ConfigValue
    created: int


@dataclass(frozen=True, slots=True)
class Delta:
    """One atomic step to ``revision``. With ``reset`` the upserts are all there is.

    With ``stale`` the store can't be followed any more, and there may be steps nobody here knows of.
    """

    upserts: Mapping[str, str]
    deletes: frozenset[str]
    revision: int
    reset: bool = False
    stale: bool = False

    def __bool__(self) -> bool:
        return bool(self.reset or self.upserts or self.deletes or self.stale)


class View:
    """What the mirror knows, for many subscribers."""

    def __init__(self, queue_deltas: int = QUEUE_DELTAS) -> None:
        self.entries: dict[str, Entry] = {}
        self.malformed: dict[str, str] = {}
        """Keys whose stored value can't be used, with the reason."""
        self.revision = 0
        self.synced = asyncio.Event()
        """Set once the first snapshot is in; never cleared."""
        self.stale = False
        """Whether the store can't be followed just now."""
        self._queue_deltas = queue_deltas
        self.subscriptions: set[Subscription] = set()
        self.closed = False
        """Whether the subscriptions have ended."""
        self._step = asyncio.Event()

    def apply(self, changes: Iterable[Change], revision: int) -> None:
        """One step forward: the changes in their order, seen by every subscriber as one delta."""
        before: dict[str, Entry | None] = {}
        for change in changes:
            before.setdefault(change.key, self.entries.get(change.key))
            if isinstance(change, Put):
                self._put(change)
            else:
                self.entries.pop(change.key, None)
                self.malformed.pop(change.key, None)
        self.revision = revision
        self._publish(self._delta_since(before))

    def replace(self, puts: Iterable[Put], revision: int) -> None:
        """A fresh snapshot, turned into the one delta that leads to it.

        Of a key it may hold earlier writes, before its last.
        """
        puts = list(puts)
        gone = (self.entries.keys() | self.malformed.keys()) - {put.key for put in puts}
        self.apply([*(Delete(key) for key in gone), *puts], revision)
        self.synced.set()

    def subscribe(self, app: str = "") -> Subscription:
        """A subscription to all, or to what concerns one app; to be used as a context manager."""
        return Subscription(self, app, self._queue_deltas)

    def snapshot(self, app: str = "") -> Delta:
        """Everything, or everything that concerns one app."""
        upserts = {key: entry.value_json for key, entry in self.entries.items() if concerns(key, app)}
        return Delta(upserts, frozenset(), self.revision, reset=True, stale=self.stale)

    def set_stale(self, stale: bool) -> None:
        """Says whether the store can be followed; subscribers are told when it no longer can."""
        if stale and not self.stale:
            self._publish(Delta({}, frozenset(), self.revision, stale=True))
        self.stale = stale

    def close(self) -> None:
        """Ends every subscription, now and to come."""
        self.closed = True
        for subscription in self.subscriptions:
            subscription.wake()

    async def reached(self, revision: int) -> None:
        """Waits until the view is at ``revision`` or beyond."""
        while self.revision < revision:
            await self._step.wait()

    def _put(self, put: Put) -> None:
        try:
            value = parse(put.key, put.value)
        except MalformedConfig as error:
            known = self.entries.get(put.key)
            if known and known.created != put.created:
                # Deleted meanwhile and created anew: the last good value was another key's, so to say.
                del self.entries[put.key]
            if self.malformed.get(put.key) != str(error):
                log.warning("config skipped", key=put.key, reason=str(error), last_good_kept=put.key in self.entries)
            self.malformed[put.key] = str(error)
            return
        self.malformed.pop(put.key, None)
        self.entries[put.key] = Entry(put.value.decode(), value, put.created)

    def _delta_since(self, before: Mapping[str, Entry | None]) -> Delta:
        upserts = {}
        for key, old in before.items():
            new = self.entries.get(key)
            if new and (old is None or old.value_json != new.value_json):
                upserts[key] = new.value_json
        deletes = frozenset(key for key, old in before.items() if old and key not in self.entries)
        return Delta(upserts, deletes, self.revision)

    def _publish(self, delta: Delta) -> None:
        if delta:
            for subscription in self.subscriptions:
                subscription.offer(delta)
        self._step.set()
        self._step = asyncio.Event()


class Subscription:
    """One subscriber's steps: first everything, then every delta; everything anew where it fell behind."""

    def __init__(self, view: View, app: str, queue_deltas: int) -> None:
        self._view = view
        self._app = app
        self._limit = queue_deltas
        self._pending: deque[Delta] = deque()
        self._behind = True
        self._changed = asyncio.Event()

    def __enter__(self) -> Subscription:
        self._view.subscriptions.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._view.subscriptions.discard(self)

    def offer(self, delta: Delta) -> None:
        """Takes a step of the view, at once."""
        relevant = _for_app(delta, self._app)
        if self._behind or not relevant:
            return
        if len(self._pending) >= self._limit:
            self._pending.clear()
            self._behind = True
        else:
            self._pending.append(relevant)
        self.wake()

    def wake(self) -> None:
        """Makes a waiting subscriber look again."""
        self._changed.set()

    async def next(self) -> Delta | None:
        """The next step, as soon as there is one; None once the view is closed."""
        while not self._view.closed:
            if self._behind:
                self._behind = False
                return self._view.snapshot(self._app)
            if self._pending:
                return self._pending.popleft()
            self._changed.clear()
            await self._changed.wait()
        return None


def concerns(key: str, app: str) -> bool:
    """Whether a key concerns an app: its own keys and the defaults. Every key concerns the empty app, which is all."""
    return not app or app_of(key) in (None, app)


def _for_app(delta: Delta, app: str) -> Delta:
    if not app:
        return delta
    return Delta(
        {key: value for key, value in delta.upserts.items() if concerns(key, app)},
        frozenset(key for key in delta.deletes if concerns(key, app)),
        delta.revision,
        stale=delta.stale,
    )
