"""The current config and its subscribers.

Three invariants hold at any time:

1. ``entries`` equals the store at ``revision``, but with well-formed values only. A key with a malformed value is in
   ``malformed``, and its entry keeps the last good value since the key was created. Malformed access rules are closed,
   whatever they were before, and so are those under an unknown key (:mod:`atserving.misplaced_rules`). A key whose
   deletion is held back (:mod:`atserving.holdback`) keeps its entry.
2. A subscriber that applies its steps in order has the ``entries`` of the last step.
3. A slow subscriber delays nobody.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

import structlog

from atserving import misplaced_rules
from atserving.config import CLOSED, ConfigValue, MalformedConfig, app_of, is_access_rules, read
from atserving.holdback import Holdback
from registry.inventory import Inventory

log = structlog.get_logger()

QUEUE_DELTAS = 256
"""The length of a subscriber's queue. A subscriber that falls further behind receives a new snapshot."""


@dataclass(frozen=True, slots=True)
class Put:
    """A key was written at ``revision``, under a lease (0: none); ``created`` is the revision that created it."""

    key: str
    value: bytes
    created: int
    revision: int = 0
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """A key was deleted, or its lease expired."""

    key: str


Change = Put | Delete


@dataclass(frozen=True, slots=True)
class Entry:
    """The last good value of a key, as stored and as parsed, the revision that wrote it, and its lease (0: none)."""

    value_json: str
    value: ConfigValue
    created: int
    revision: int = 0
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """One atomic step to ``revision``. With ``reset``, the upserts are a complete snapshot.

    With ``stale``, the watch of the store is down, and the store may have changes that the view lacks. ``rewritten``
    keys were written without a change of what is served: the value is the same, or malformed.
    """

    upserts: Mapping[str, str]
    deletes: frozenset[str]
    revision: int
    reset: bool = False
    stale: bool = False
    rewritten: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.reset or self.upserts or self.deletes or self.stale)


class View:
    """The mirrored config, for many subscribers."""

    def __init__(self, queue_deltas: int = QUEUE_DELTAS, hold_s: float = 0) -> None:
        self.entries: dict[str, Entry] = {}
        self.by_app: dict[str, set[str]] = {}
        """The keys of the entries by their app; those of the defaults by an empty name."""
        self.inventory = Inventory()
        self.malformed: dict[str, str] = {}
        """Keys with a malformed value, and the reason."""
        self.malformed_at: dict[str, int] = {}
        """The revisions of these values."""
        self.warnings: dict[str, str] = {}
        """Keys with unknown fields, which nobody uses."""
        self.revision = 0
        self.holdback = Holdback(hold_s, self._drop)
        self.synced = asyncio.Event()
        """Set after the first snapshot; never cleared."""
        self.stale = False
        """Whether the watch of the store is down."""
        self._queue_deltas = queue_deltas
        self.subscriptions: set[Subscription] = set()
        self.fell_behind = 0
        """How often a subscriber was so slow that it receives a new snapshot."""
        self.closed = False
        """Whether the subscriptions have ended."""
        self._step = asyncio.Event()

    def apply(self, changes: Iterable[Change], revision: int, *, vetted: bool = False) -> None:
        """Apply changes in order, and send them to every subscriber as one delta.

        Deletions of ``vetted`` changes, which an operator made by a call, are not held back.
        """
        self._apply(self._taken(list(changes), snapshot=False, vetted=vetted), revision)

    def _taken(self, changes: list[Change], *, snapshot: bool, vetted: bool = False) -> list[Change]:
        """Return the changes without the deletions that are held back, and with those that are so no longer."""
        last = {change.key: change for change in changes}
        deletes = {key for key, change in last.items() if isinstance(change, Delete)}
        writes = last.keys() - deletes
        taken = self.holdback.taken(self.entries.keys(), writes, deletes, snapshot=snapshot, vetted=vetted)
        held = deletes - taken
        return [
            *(each for each in changes if each.key not in held or isinstance(each, Put)),
            *map(Delete, taken - deletes),
        ]

    def _drop(self, keys: Set[str]) -> None:
        self._apply(map(Delete, keys), self.revision)

    def _apply(self, changes: Iterable[Change], revision: int) -> None:
        before: dict[str, Entry | None] = {}
        for change in changes:
            before.setdefault(change.key, self.entries.get(change.key))
            if isinstance(change, Put):
                self._put(change)
            else:
                self._remove(change.key)
                self.malformed.pop(change.key, None)
                self.malformed_at.pop(change.key, None)
                self.warnings.pop(change.key, None)
        self.revision = revision
        self._publish(self._delta_since(before))

    def replace(self, puts: Iterable[Put], revision: int) -> None:
        """Replace the config by a snapshot, and send the difference as one delta.

        ``puts`` may hold earlier writes of a key before its last one.
        """
        puts = list(puts)
        deleted = (self.entries.keys() | self.malformed.keys()) - {put.key for put in puts}
        self._apply(self._taken([*(Delete(key) for key in deleted), *puts], snapshot=True), revision)
        self.synced.set()

    def subscribe(self, app: str = "", *, rewritten: bool = False) -> Subscription:
        """Return a subscription to one app, or to everything; use it as a context manager.

        With ``rewritten``, it has steps that change nothing of what is served, too.
        """
        return Subscription(self, app, self._queue_deltas, rewritten)

    def snapshot(self, app: str = "") -> Delta:
        """Return all entries of one app, or all entries, as one delta."""
        upserts = {key: entry.value_json for key, entry in self.entries.items() if concerns(key, app)}
        return Delta(upserts, frozenset(), self.revision, reset=True, stale=self.stale)

    def set_stale(self, stale: bool) -> None:
        """Set whether the watch of the store is down, and tell the subscribers when it goes down."""
        if stale and not self.stale:
            self._publish(Delta({}, frozenset(), self.revision, stale=True))
        self.stale = stale

    def close(self) -> None:
        """End all subscriptions, present and future."""
        self.closed = True
        for subscription in self.subscriptions:
            subscription.wake()

    async def reached(self, revision: int) -> None:
        """Wait until the view is at ``revision`` or beyond."""
        while self.revision < revision:
            await self._step.wait()

    def _put(self, put: Put) -> None:
        try:
            value, warning = read(put.key, put.value)
        except MalformedConfig as error:
            self._put_malformed(put, str(error))
            return
        self.malformed.pop(put.key, None)
        self.malformed_at.pop(put.key, None)
        self._enter(put.key, Entry(put.value.decode(), value, put.created, put.revision, put.lease))
        if not warning:
            self.warnings.pop(put.key, None)
        elif self.warnings.get(put.key) != warning:
            log.warning("config fields unknown", key=put.key, reason=warning)
            self.warnings[put.key] = warning

    def _enter(self, key: str, entry: Entry) -> None:
        self.inventory.change(self.entries.get(key), entry)
        self.entries[key] = entry
        if (app := _app(key)) is not None:
            self.by_app.setdefault(app, set()).add(key)

    def _remove(self, key: str) -> None:
        if not (entry := self.entries.pop(key, None)):
            return
        self.inventory.change(entry, None)
        if (app := _app(key)) is not None:
            keys = self.by_app[app]
            keys.discard(key)
            if not keys:
                del self.by_app[app]

    def _put_malformed(self, put: Put, reason: str) -> None:
        self.warnings.pop(put.key, None)
        known = self.entries.get(put.key)
        misplaced = misplaced_rules.may_hold(put.key, put.value)
        closes = is_access_rules(put.key) or (misplaced and bool(misplaced_rules.apps_of(put.key)))
        if known and (known.created != put.created or known.value is CLOSED):
            # The key was deleted and created again, so the last good value belongs to its earlier life; or it has none.
            self._remove(put.key)
        if misplaced:
            reason = f"{reason}; {misplaced_rules.consequence(put.key)}"
        elif closes:
            which = "the app is" if app_of(put.key) else "apps without rules of their own are"
            reason = f"{reason}; {which} closed until you correct the value"
        if closes:
            # The last good rules may be what their writer wanted to close; without any, an app is open to all.
            self._enter(put.key, Entry(CLOSED.to_json(), CLOSED, put.created, put.revision))
        if self.malformed.get(put.key) != reason:
            kept = put.key in self.entries and not closes
            log.warning("config skipped", key=put.key, reason=reason, last_good_kept=kept)
        self.malformed[put.key] = reason
        self.malformed_at[put.key] = put.revision

    def _delta_since(self, before: Mapping[str, Entry | None]) -> Delta:
        upserts = {}
        for key, old in before.items():
            new = self.entries.get(key)
            if new and (old is None or old.value_json != new.value_json):
                upserts[key] = new.value_json
        deletes = frozenset(key for key, old in before.items() if old and key not in self.entries)
        rewritten = frozenset(
            key for key in before if key not in upserts and key not in deletes and _app(key) is not None
        )
        return Delta(upserts, deletes, self.revision, rewritten=rewritten)

    def _publish(self, delta: Delta) -> None:
        if delta or delta.rewritten:
            for subscription in self.subscriptions:
                subscription.offer(delta)
        self._step.set()
        self._step = asyncio.Event()


class Subscription:
    """The steps of one subscriber: a snapshot, then every delta; after falling behind, a new snapshot."""

    def __init__(self, view: View, app: str, queue_deltas: int, rewritten: bool) -> None:
        self._view = view
        self._app = app
        self._limit = queue_deltas
        self._rewritten = rewritten
        self._pending: deque[Delta] = deque()
        self._behind = True
        self._changed = asyncio.Event()

    @property
    def kind(self) -> str:
        """Who follows: only operators hear of rewritten keys, and only gates need all apps."""
        return "operator" if self._rewritten else "evaluator" if self._app else "gate"

    def __enter__(self) -> Subscription:
        self._view.subscriptions.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._view.subscriptions.discard(self)

    def offer(self, delta: Delta) -> None:
        """Queue a step of the view, without waiting."""
        relevant = _for_app(delta, self._app)
        if self._behind or not (relevant or (self._rewritten and relevant.rewritten)):
            return
        if len(self._pending) >= self._limit:
            self._pending.clear()
            self._behind = True
            self._view.fell_behind += 1
        else:
            self._pending.append(relevant)
        self.wake()

    def wake(self) -> None:
        """Wake a subscriber that waits in ``next``."""
        self._changed.set()

    async def next(self) -> Delta | None:
        """Wait for the next step; None after the view was closed."""
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
    """Return whether a key belongs to an app or to the defaults. The empty app stands for all apps, and any key."""
    return not app or _app(key) in ("", app)


def _app(key: str) -> str | None:
    """Return the app that a key belongs to, an empty text for a default, and None for an unknown key."""
    try:
        return app_of(key) or ""
    except MalformedConfig:
        return None


def _for_app(delta: Delta, app: str) -> Delta:
    if not app:
        return delta
    return Delta(
        {key: value for key, value in delta.upserts.items() if concerns(key, app)},
        frozenset(key for key in delta.deletes if concerns(key, app)),
        delta.revision,
        stale=delta.stale,
        rewritten=frozenset(key for key in delta.rewritten if concerns(key, app)),
    )
