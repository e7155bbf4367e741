"""The operators: those of etcd, which admins change, beside those of the registry's file, which no call changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog

from atserving.admin.v1 import admin_pb2
from atserving.config import NOTE_KEY, OPERATORS, MalformedConfig
from atserving.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from registry.admin import paging
from registry.admin.history import OPERATORS_APP
from registry.admin.state import ABSENT
from registry.admin.writes import Intent, Writer, stale
from registry.etcd import EtcdClient, delete, put, unwritten_since, written_at
from registry.operators import Identity, Operator, Operators
from registry.operators.roster import read, text_of

log = structlog.get_logger()

_ATTEMPTS = 4
_MOST_OPERATORS = 1000
_ROLES = {
    "viewer": admin_pb2.ROLE_VIEWER,
    "publisher": admin_pb2.ROLE_PUBLISHER,
    "admin": admin_pb2.ROLE_ADMIN,
}
_ROLE_NAMES: dict[int, str] = {number: name for name, number in _ROLES.items()}
_WAYS = ("token_sha256", "certificate", "issuer", "subject", "group")


Edit = Callable[[Mapping[str, Operator]], Operator | None]
"""Returns the operator to write, from the present ones by name; None: remove it."""


@dataclass(frozen=True)
class _Stored:
    """The well-formed operators of etcd by name, and the revisions of all keys."""

    operators: Mapping[str, Operator]
    revisions: Mapping[str, int]
    at: int

    def has(self, name: str, wanted: Operator | None) -> bool:
        """Return whether this is how an operator is written; None: it is not there."""
        return self.operators.get(name) == wanted if wanted else not self.revision(name)

    def revision(self, name: str) -> int:
        return self.revisions.get(OPERATORS + name, 0)

    def admins(self) -> set[str]:
        return {name for name, each in self.operators.items() if each.role == "admin"}


class OperatorStore:
    """Lists and changes operators."""

    def __init__(self, client: EtcdClient, writer: Writer, operators: Operators | None) -> None:
        self._client = client
        self._writer = writer
        self.known = operators
        """None: this registry asks nobody who they are."""

    def list(self, request: admin_pb2.ListOperatorsRequest) -> admin_pb2.ListOperatorsResponse:
        """Return a page of them, sorted by name. Raises InvalidArgument, FailedPrecondition."""
        known = self._required()
        found = {name: to_proto(each, known.roster.revisions[name]) for name, each in known.roster.operators.items()}
        found |= {each.name: to_proto(each) for each in known.of_file}
        page = paging.Page[admin_pb2.Operator](request.page_size, request.page_token)
        for name, each in sorted(found.items()):
            if name > page.after and not page.add(each, name):
                break
        return admin_pb2.ListOperatorsResponse(operators=page.items, next_page_token=page.token)

    async def put(self, message: admin_pb2.Operator, intent: Intent) -> admin_pb2.Operator:
        """Add or replace an operator. Raises InvalidArgument, FailedPrecondition, Aborted, Unavailable, EtcdError."""
        known = self._required()
        if message.issuer and message.issuer not in known.issuers:
            reason = f"the registry's file of operators has no issuer {message.issuer[:80]!r}"
            raise InvalidArgument(f"issuer: {reason}", fields={"issuer": reason})

        def edit(before: Mapping[str, Operator]) -> Operator:
            wanted = _wanted(message, before.get(message.name))
            for each in (*known.of_file, *before.values()):
                if each.key == wanted.key and each.name != wanted.name:
                    raise FailedPrecondition(f"operator {each.name!r} has this token, certificate, subject or group")
            if wanted.name not in before and len(before) >= _MOST_OPERATORS:
                raise FailedPrecondition(f"etcd has {_MOST_OPERATORS} operators, which is the limit")
            return wanted

        wanted, revision = await self._write(message.name, intent, edit)
        assert wanted is not None
        return to_proto(wanted, revision)

    async def delete(self, name: str, intent: Intent) -> None:
        """Remove an operator. Raises NotFound, FailedPrecondition, Aborted, Unavailable, EtcdError."""
        await self._write(name, intent, lambda _: None)

    async def _write(self, name: str, intent: Intent, edit: Edit) -> tuple[Operator | None, int]:
        """Write an operator, or remove it; return it, and the revision."""
        if name in {each.name for each in self._required().of_file}:
            raise FailedPrecondition(f"operator {name!r} is in the registry's file of operators: change it there")
        tried: list[Operator | None] = []
        for _ in range(_ATTEMPTS):
            stored = await self._read()
            if tried and stored.has(name, tried[0]):
                # It took effect, though no answer came.
                intent.notes["revision"] = stored.revision(name) or stored.at
                return tried[0], stored.revision(name)
            wanted = _decided(stored, name, intent, edit)
            admin = self._admin_left(stored, name, wanted)
            if intent.validate_only or stored.has(name, wanted):
                return wanted, stored.revision(name)
            tried = [wanted]
            intent.notes.update(revision_before=stored.at, keys=[OPERATORS + name])
            written = await self._commit(stored, {name, admin or name}, name, wanted, intent)
            if written is not None:
                intent.notes["revision"] = written
                log.info("config written", app=OPERATORS_APP, method=intent.method, revision=written, keys=1)
                await self._writer.settled(written)
                return wanted, written
        raise Unavailable("the operators keep changing in etcd: try again")

    async def _read(self) -> _Stored:
        kvs, revision = await self._client.get_below([OPERATORS], [])
        operators = {}
        for kv in kvs:
            with suppress(MalformedConfig):
                operator = read(text_of(kv.key), kv.value)
                operators[operator.name] = operator
        return _Stored(operators, {text_of(kv.key): kv.mod_revision for kv in kvs}, revision)

    async def _commit(
        self, stored: _Stored, relied_on: set[str], name: str, wanted: Operator | None, intent: Intent
    ) -> int | None:
        unchanged = [unwritten_since(OPERATORS, stored.at)]
        unchanged += [written_at(OPERATORS + each, stored.revision(each)) for each in sorted(relied_on)]
        key = OPERATORS + name
        operation = put(key, wanted.to_json()) if wanted else delete(key)
        return await self._client.commit(unchanged, [operation, put(NOTE_KEY, intent.note())])

    def _admin_left(self, stored: _Stored, name: str, wanted: Operator | None) -> str:
        """Return an admin of etcd who has to stay; empty if none has to. Raises FailedPrecondition if none is left."""
        if wanted and wanted.role == "admin":
            return ""
        if name not in stored.admins() or any(each.role == "admin" for each in self._required().of_file):
            return ""
        if not (left := stored.admins() - {name}):
            raise FailedPrecondition(f"{name!r} is the last admin: add another one first")
        return min(left)

    def _required(self) -> Operators:
        if self.known is None:
            raise FailedPrecondition("this registry asks nobody who they are: start it with --operators")
        return self.known


def _decided(stored: _Stored, name: str, intent: Intent, edit: Edit) -> Operator | None:
    """Return what to write. Raises Aborted for a stale etag, NotFound, and what ``edit`` raises."""
    etag = str(stored.revision(name) or ABSENT)
    if intent.etag and intent.etag != etag:
        raise stale(etag, intent.etag[:100])
    wanted = edit(stored.operators)
    if wanted is None and not stored.revision(name):
        raise NotFound(f"etcd has no operator {name[:100]!r}")
    return wanted


def _wanted(message: admin_pb2.Operator, before: Operator | None) -> Operator:
    """Return the operator of a message; without what tells who it is, it keeps that. Raises InvalidArgument."""
    role = "viewer" if message.role == admin_pb2.ROLE_UNSPECIFIED else _ROLE_NAMES.get(message.role)
    fields: dict[str, Any] = {"name": message.name, "role": role, "apps": list(message.apps)}
    given = {name: getattr(message, name) for name in _WAYS if getattr(message, name)}
    if not given and before:
        given = {name: value for name in _WAYS if (value := getattr(before, name))}
    try:
        return msgspec.convert({**fields, **given}, Operator)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at ")
        field = place.strip("`$.").partition("[")[0]
        raise InvalidArgument(f"{field or 'operator'}: {reason}", fields={field or "operator": reason}) from None


def to_proto(operator: Operator, revision: int = 0) -> admin_pb2.Operator:
    """Return an operator, without the digest of its token; without a revision, it is one of the file."""
    return admin_pb2.Operator(
        name=operator.name,
        etag=str(revision) if revision else "",
        role=_ROLES[operator.role],
        apps=operator.apps,
        has_token=bool(operator.token_sha256),
        certificate=operator.certificate,
        issuer=operator.issuer,
        subject=operator.subject,
        group=operator.group,
        in_file=not revision,
    )


def self_to_proto(identity: Identity) -> admin_pb2.Operator:
    """Return who asks, and what they may do."""
    return admin_pb2.Operator(name=identity.name, role=_ROLES[identity.role], apps=identity.apps)
