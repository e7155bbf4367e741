"""Tells who makes a call, by tokens and certificates, and refuses what the roles do not allow."""

from __future__ import annotations

import asyncio
import hashlib
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import structlog
from google.protobuf.message import Message

from atserving import operators as entries
from atserving.errors import PermissionDenied, StartError, Unauthenticated
from atserving.followed_files import FollowedFiles
from atserving.operators import Key, Operator, OperatorFile, Role
from registry.operators.roster import Roster

if TYPE_CHECKING:
    from registry.operators.tokens import Tokens

log = structlog.get_logger()

READS = ("Get", "List", "Watch")
"""The beginnings of the names of methods that change nothing."""

_OPERATORS = ("PutOperator", "DeleteOperator")
_BEARER = "bearer "
_ASKED = "the registry wants to know who you are: run atserving login, or set ATSERVING_TOKEN"
_MOST_CHARS = 8 << 10
_REMIND_S = 10.0
_ROLES: tuple[Role, ...] = ("viewer", "publisher", "admin")


class Shown(Protocol):
    """What a call shows of who makes it."""

    @property
    def peer_names(self) -> tuple[str, ...]:
        """The URIs in the verified certificate of the peer."""

    @property
    def notes(self) -> dict[str, Any]:
        """Notes on the call, for the audit log."""

    def header(self, name: str) -> str | None:
        """Return a header, or None if it is missing."""


@dataclass(frozen=True)
class Identity:
    """Who makes a call: what all its entries allow together."""

    name: str
    entries: tuple[Operator, ...]
    known_by: str
    """The kind of proof: a token, a certificate, or an issuer and its name."""

    @property
    def role(self) -> Role:
        return max((each.role for each in self.entries), key=_ROLES.index)

    @property
    def apps(self) -> tuple[str, ...]:
        """The apps that a publisher may change."""
        return tuple(sorted({app for each in self.entries for app in each.apps}))

    def may_change(self, app: str) -> bool:
        return any(each.may_change(app) for each in self.entries)


class Operators:
    """Knows the operators of the file and of etcd."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises StartError."""
        self.roster = Roster()
        """Those of etcd. The mirror fills it."""
        self._file = FollowedFiles(path)
        self._wake = asyncio.Event()
        self._tokens: Tokens | None = None
        self._refused = 0
        self._told_s = float("-inf")
        self._take()

    @property
    def of_file(self) -> tuple[Operator, ...]:
        """Those of the file."""
        return self._found.operators

    @property
    def issuers(self) -> tuple[str, ...]:
        """The names of the issuers whose tokens count."""
        return tuple(each.name for each in self._found.issuers)

    def find(self, key: Key) -> Operator | None:
        """Return the operator whom a proof names. The file decides first, about names too."""
        if found := self._by_key.get(key):
            return found
        found = self.roster.find(key)
        return None if found is None or found.name in self._names else found

    def authorize(self, method: str, request: Message, context: Shown) -> str:
        """Return the name of the operator who makes a call. Raises Unauthenticated, PermissionDenied, Unavailable."""
        who = self.identify(context)
        context.notes.update(operator=who.name, role=who.role, known_by=who.known_by)
        changes = not method.startswith(READS) and not getattr(request, "validate_only", False)
        app = app_of(request)
        if changes and not who.may_change(app):
            whose = f"app {app[:80]!r}" if app else "who may operate" if method in _OPERATORS else "what all apps share"
            raise PermissionDenied(f"{who.name} is {who.role}, and may not change {whose}")
        return who.name

    def identify(self, context: Shown) -> Identity:
        """Return who makes a call. Raises Unauthenticated, PermissionDenied, Unavailable."""
        self._follow()
        try:
            if shown := context.header("authorization"):
                return self._of_token(shown)
            if context.peer_names:
                return self._of_certificate(context.peer_names)
            raise Unauthenticated(_ASKED)
        except (Unauthenticated, PermissionDenied) as error:
            self._tell(error.message)
            raise

    async def run(self) -> None:
        """Keep the keys of issuers fresh, until cancelled."""
        while True:
            self._wake.clear()
            pause_s = await self._tokens.refresh() if self._tokens else None
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()

    def _of_token(self, shown: str) -> Identity:
        if len(shown) > _MOST_CHARS:
            raise Unauthenticated(f"the token is longer than {_MOST_CHARS} characters")
        if not shown.lower().startswith(_BEARER):
            raise Unauthenticated("the registry does not know this token: it wants `Bearer`")
        token = shown[len(_BEARER) :].strip()
        # How long a look-up by the digest takes tells nothing of the tokens.
        digest = hashlib.sha256(token.encode()).hexdigest()
        if found := self.find(entries.of_token(digest)):
            return Identity(found.name, (found,), "token")
        bearer = self._tokens.read(token) if self._tokens and token.count(".") == 2 else None
        if bearer is None:
            raise Unauthenticated("the registry does not know this token")
        own = self.find(entries.of_subject(bearer.issuer, bearer.subject))
        groups = [self.find(entries.of_group(bearer.issuer, each)) for each in bearer.groups]
        # Names of operators have no slash, so nobody passes for one of them.
        name = own.name if own else f"{bearer.issuer}/{bearer.subject}"
        allowing = tuple(each for each in (own, *groups) if each)
        if not allowing:
            raise PermissionDenied(f"{name} is no operator here: neither you nor a group of yours is one")
        return Identity(name, allowing, f"issuer {bearer.issuer}")

    def _of_certificate(self, names: tuple[str, ...]) -> Identity:
        found = tuple(each for name in names if (each := self.find(entries.of_certificate(name))))
        if not found:
            raise Unauthenticated(f"{_ASKED}; the certificate of {', '.join(names)[:200]} is no operator's")
        return Identity(found[0].name, found, "certificate")

    def _tell(self, reason: str) -> None:
        """Log refusals, every ten seconds at most. The reasons have no part of a token."""
        self._refused += 1
        now_s = time.monotonic()
        if now_s - self._told_s >= _REMIND_S:
            log.warning("operators refused", count=self._refused, reason=reason)
            self._refused, self._told_s = 0, now_s

    def _follow(self) -> None:
        """Read the file again if it has changed. One that is wrong changes nothing."""
        if not self._file.changed():
            return
        try:
            self._take()
            log.info("operators changed", count=len(self._found.operators))
        except StartError as error:
            log.error("operators unchanged", reason=str(error))

    def _take(self) -> None:
        found = entries.read_file(self._file.paths[0])
        self._tokens = self._tokens_of(found)
        self._found = found
        self._by_key = {each.key: each for each in found.operators}
        self._names = {each.name for each in found.operators}
        self._wake.set()

    def _tokens_of(self, found: OperatorFile) -> Tokens | None:
        if not found.issuers:
            return None
        try:
            # It takes memory, and most registries have no issuers.
            from registry.operators.tokens import Tokens
        except ModuleNotFoundError as error:
            raise StartError(
                f"{self._file.paths[0]}: issuers need the package {error.name}: pip install 'atserving[oidc]'"
            ) from None
        try:
            return Tokens(found.issuers, self._file.paths[0].parent, self._wake.set, self._tokens)
        except StartError as error:
            raise StartError(f"{self._file.paths[0]}: {error}") from None


def app_of(request: Message) -> str:
    """Return the app that a request is about; empty if it is about the defaults, or about none."""
    for name in ("app", "release", "access", "worker"):
        if name in request.DESCRIPTOR.fields_by_name:
            about = getattr(request, name)
            if isinstance(about, str):
                return about
            found: str = about.name if name == "app" else about.app
            return found
    return ""
