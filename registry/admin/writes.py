"""Changes of the config: read from etcd, checked, and written in one transaction if nothing has changed in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import orjson
import structlog

from atserving.config import ACCEPT_KEY, NOTE_KEY, Acceptance, MalformedConfig, app_of, read, release_key
from atserving.errors import Aborted, FailedPrecondition, InvalidArgument, Unavailable
from atserving.v1 import etcd_pb2
from registry.admin import guards
from registry.admin.history import Recorder
from registry.admin.signed import Signatures
from registry.admin.state import (
    ABSENT,
    AppState,
    needs_new_instances,
    ranges_of,
    without_answers,
    worker_key,
)
from registry.etcd import EtcdClient, delete, delete_below, put, unwritten_since, written_at
from registry.mirror import Mirror
from registry.view import Entry

log = structlog.get_logger()

MAX_VALUE_BYTES = 1 << 20
"""The size limit of a value; etcd refuses requests above 1.5 MiB."""

ACCEPT_S = 60
"""How long an operator's word counts that accepts deletions."""

_ATTEMPTS = 4
# etcd refuses transactions of more than 128 operations or comparisons.
_MOST_KEYS, _MOST_COMPARED = 100, 120
_READ_YOUR_WRITES_S = 1.0
_HISTORY_S = 10.0

Edits = Mapping[str, str | None]
"""The JSON to write by key; None: delete the key."""


@dataclass(frozen=True)
class Intent:
    """How to make a change, and who makes it, why and by which method."""

    method: str
    etag: str = ""
    validate_only: bool = False
    force: bool = False
    message: str = ""
    actor: str = ""
    proven: bool = False
    """Whether somebody has checked that the actor is who it says."""
    notes: dict[str, Any] = field(default_factory=dict, compare=False)
    """Notes on what became of it, for the audit log."""

    def note(self) -> str:
        """Return what the recorder takes into the history."""
        fields = {"actor": self.actor, "method": self.method, "message": self.message, "time": time.time()}
        if self.proven:
            fields["proven"] = True
        return orjson.dumps(fields).decode()


class Writer:
    """Makes changes of one app at a time."""

    def __init__(
        self, client: EtcdClient, mirror: Mirror, recorder: Recorder, signatures: Signatures | None = None
    ) -> None:
        self._client = client
        self._mirror = mirror
        self._recorder = recorder
        self.signatures = signatures or Signatures(None)
        """What it wants of releases."""

    async def write(
        self,
        app: str,
        intent: Intent,
        edit: Callable[[AppState], Edits],
        etag_of: Callable[[AppState], str] = lambda state: state.etag,
    ) -> AppState:
        """Make the changes that ``edit`` wants in the state that etcd has, and return the new state.

        Raises Aborted for a stale etag, FailedPrecondition, InvalidArgument, Unavailable, EtcdError, and what ``edit``
        raises.
        """
        tried: Edits = {}
        for attempt in range(_ATTEMPTS):
            before, revision = await self._read(app)
            if tried and all(_current(before, key) == value for key, value in tried.items()):
                # It took effect, though no answer came.
                intent.notes["revision"] = max(before.revisions.get(key, 0) for key in tried) or revision
                return before
            is_stale = bool(intent.etag) and intent.etag != etag_of(before)
            if is_stale and not attempt:
                raise stale(etag_of(before), intent.etag)
            edits = {key: value for key, value in edit(before).items() if value != _current(before, key)}
            after = _edited(before, edits)
            if not edits:
                return after
            if is_stale:
                # It changed between two attempts, and not by the first one, which may have taken effect.
                raise stale(etag_of(before), intent.etag)
            self._check_held(edits, before)
            self.signatures.check(before, after)
            if not intent.force:
                guards.check(before, after)
            if intent.validate_only:
                return after
            tried = edits
            intent.notes.update(revision_before=revision, keys=sorted(edits))
            written = await self._commit(before, revision, edits, after, intent)
            if written is not None:
                intent.notes["revision"] = written
                log.info("config written", app=app, method=intent.method, revision=written, keys=len(edits))
                await self.settled(written)
                return _at_revision(after, edits, written)
        raise Unavailable(f"the config of {app or 'all apps'} keeps changing in etcd: try again")

    async def accept_deletions(self, intent: Intent) -> None:
        """Let every registry and gate take the deletions that it holds back. Raises EtcdError."""
        lease = await self._client.grant(ACCEPT_S)
        words = [put(ACCEPT_KEY, Acceptance().to_json(), lease.id), put(NOTE_KEY, intent.note())]
        intent.notes["keys"] = [ACCEPT_KEY]
        revision = (await self._client.txn([], words)).header.revision
        intent.notes["revision"] = revision
        log.warning("deletions accepted", revision=revision, actor=intent.actor, reason=intent.message)
        await self.settled(revision)

    async def until_recorded(self) -> None:
        """Wait until the history has all changes up to now. Raises Unavailable if that takes long."""
        revision = await self._client.put(NOTE_KEY, "{}")
        try:
            async with asyncio.timeout(_HISTORY_S):
                await self._recorder.reached(revision)
        except TimeoutError:
            raise Unavailable("the history is behind etcd: try again", retry_after_s=1.0) from None

    async def etag(self, app: str) -> str:
        """Return the etag of an app's config in etcd. Raises EtcdError."""
        return (await self._read(app))[0].etag

    async def _read(self, app: str) -> tuple[AppState, int]:
        kvs, revision = await self._client.get_below(*ranges_of(app))
        return AppState.read(app, kvs), revision

    def _check_held(self, edits: Edits, before: AppState) -> None:
        """Refuse a change of an app whose deletion is held back: what is served is not what etcd has.

        To write the keys that are gone is the way back.
        """
        held = {key for key in self._mirror.view.holdback.held if "/instance/" not in key}
        if all(key in held and value is not None for key, value in edits.items()):
            return
        for key in held:
            with suppress(MalformedConfig):
                if app_of(key) == (before.app or None):
                    raise FailedPrecondition(
                        f"{key} is gone from etcd with most others, and still in use: restore etcd, or accept the "
                        "deletions first"
                    )

    async def _commit(
        self, before: AppState, revision: int, edits: Edits, after: AppState, intent: Intent
    ) -> int | None:
        prefixes, keys = ranges_of(before.app)
        # Its instances come and go.
        config = [each for each in prefixes if "/instance/" not in each]
        unchanged = [unwritten_since(each, revision) for each in config]
        unchanged += [written_at(key, before.revisions.get(key, 0)) for key in keys]
        operations: list[etcd_pb2.RequestOp]
        if not after.exists and config:
            operations = [*map(delete_below, config), *map(delete, keys)]
        else:
            relied_on = {each.key for each in (*after.serving()[:10], *after.production()[:10])} | edits.keys()
            relied_on |= _named(before, after, edits)
            if len(edits) > _MOST_KEYS or len(relied_on) > _MOST_COMPARED:
                raise FailedPrecondition(
                    f"the change has {len(edits)} keys, and relies on {len(relied_on)}; the most at once are "
                    f"{_MOST_KEYS} and {_MOST_COMPARED}"
                )
            unchanged += [written_at(key, before.revisions.get(key, 0)) for key in relied_on - set(keys)]
            operations = [delete(key) if value is None else put(key, value) for key, value in edits.items()]
        return await self._client.commit(unchanged, [*operations, put(NOTE_KEY, intent.note())])

    async def settled(self, revision: int) -> None:
        """Wait until this registry shows the change. It is done even if that is late."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_READ_YOUR_WRITES_S):
                await self._mirror.view.reached(revision)
                await self._recorder.reached(revision)


def _named(before: AppState, after: AppState, edits: Edits) -> set[str]:
    """Return the releases that the edited routing and worker settings name: they must not go meanwhile."""
    routing = after.routing
    names = {version for alias, version in routing.aliases.items() if before.routing.aliases.get(alias) != version}
    if routing.shadow and routing.shadow != before.routing.shadow:
        names.add(routing.shadow.version)
    names |= {
        each.version for each in after.releases.values() if edits.get(worker_key(after.app, each.version)) is not None
    }
    return {release_key(after.app, name) for name in names}


def stale(etag: str, wanted: str) -> Aborted:
    """Return the error for a write with another etag than that of its object."""
    if etag == ABSENT:
        return Aborted(f"it is gone: you know it with the etag {wanted}")
    if wanted == ABSENT:
        return Aborted(f"it exists, with the etag {etag}")
    return Aborted(f"it has changed: its etag is {etag}, not {wanted}")


def _current(state: AppState, key: str) -> str | None:
    entry = state.entries.get(key)
    if entry:
        return entry.value_json
    # A malformed value is there, too.
    return "" if key in state.malformed else None


def _edited(before: AppState, edits: Edits) -> AppState:
    """Return the state with the edits. Raises InvalidArgument if a value is malformed or too large."""
    entries = dict(before.entries)
    malformed = dict(before.malformed)
    warnings: dict[str, str] = {}
    for key, text in edits.items():
        entries.pop(key, None)
        malformed.pop(key, None)
        if text is None:
            continue
        if len(text.encode()) > MAX_VALUE_BYTES:
            raise InvalidArgument(f"{len(text.encode())} bytes of JSON exceed the limit of {MAX_VALUE_BYTES}")
        try:
            value, warning = read(key, text)
        except MalformedConfig as error:
            field, _, reason = str(error).partition(": ")
            if not reason or " " in field:
                raise InvalidArgument(f"{key}: {error}") from None
            raise InvalidArgument(str(error), fields={field: reason}) from None
        entries[key] = Entry(text, value, 0, before.revisions.get(key, 0))
        if warning:
            warnings[key] = warning
    after = AppState(before.app, entries, malformed)
    after.revisions = {
        key: before.revisions.get(key, 0)
        for key in before.revisions.keys() | edits.keys()
        if edits.get(key, "") is not None
    }
    after.warnings = warnings
    after.warn({key: reason for key, reason in after.ineffective().items() if key in edits})
    after.warn(needs_new_instances(before, after))
    after.warn(without_answers(before, after))
    return after


def _at_revision(state: AppState, edits: Iterable[str], revision: int) -> AppState:
    entries = {
        key: Entry(each.value_json, each.value, each.created, revision) if key in edits else each
        for key, each in state.entries.items()
    }
    written = AppState(state.app, entries, state.malformed)
    written.revisions = {key: revision if key in edits else old for key, old in state.revisions.items()}
    written.warnings = state.warnings
    return written
