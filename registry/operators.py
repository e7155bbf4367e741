"""Tells operators apart by their tokens, whose digests are in a file, and refuses what their roles do not allow."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import structlog
from google.protobuf.message import Message

from atserving.errors import PermissionDenied, StartError, Unauthenticated
from atserving.rpc import Context

log = structlog.get_logger()

_READS = ("Get", "List", "Watch")
_BEARER = "bearer "


class Operator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One operator: a person, or a program such as a pipeline."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[!-~]{1,100}\Z")]
    token_sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    role: Literal["viewer", "publisher", "admin"] = "viewer"
    apps: tuple[str, ...] = ()
    """The apps of a publisher, by name; ``team-*`` stands for all names with this beginning."""

    def may_change(self, app: str) -> bool:
        """Return whether the operator may change the config of an app; of the defaults, if it is empty."""
        if self.role != "publisher":
            return self.role == "admin"
        return bool(app) and any(app.startswith(each[:-1]) if each.endswith("*") else app == each for each in self.apps)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    operators: list[Operator]


class Operators:
    """Tells operators apart by their tokens, and refuses what they may not do."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises StartError."""
        self._path = path
        self._seen = self._stamp()
        self._by_digest = self._read()

    def authorize(self, method: str, request: Message, context: Context) -> str:
        """Return the name of the operator who makes a call. Raises Unauthenticated, PermissionDenied."""
        operator = self._of(context)
        changes = not method.startswith(_READS) and not getattr(request, "validate_only", False)
        if changes and not operator.may_change(_app_of(request)):
            whose = f"app {_app_of(request)[:80]!r}" if _app_of(request) else "what all apps share"
            raise PermissionDenied(f"{operator.name} is {operator.role}, and may not change {whose}")
        return operator.name

    def _of(self, context: Context) -> Operator:
        self._follow()
        shown = context.header("authorization") or ""
        if not shown:
            raise Unauthenticated("the registry wants to know who you are: run atserving login, or set ATSERVING_TOKEN")
        digest = hashlib.sha256(shown[len(_BEARER) :].strip().encode()).hexdigest()
        operator = self._by_digest.get(digest) if shown.lower().startswith(_BEARER) else None
        if operator is None:
            raise Unauthenticated("the registry does not know this token")
        return operator

    def _follow(self) -> None:
        """Read the file again if it has changed. One that is wrong changes nothing."""
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._by_digest = self._read()
            log.info("operators changed", count=len(self._by_digest))
        except StartError as error:
            log.error("operators unchanged", reason=str(error))

    def _stamp(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return (0, 0, 0)
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _read(self) -> dict[str, Operator]:
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=_File).operators
        except OSError as error:
            raise StartError(f"can't read {self._path} for --operators: {error.strerror}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise StartError(f"{self._path}: {error}") from None
        by_digest = {each.token_sha256: each for each in found}
        if len(by_digest) < len(found) or len({each.name for each in found}) < len(found):
            raise StartError(f"{self._path}: two operators have the same name or token")
        return by_digest


def _app_of(request: Message) -> str:
    """Return the app that a request is about; empty if it is about the defaults, or about none."""
    for name in ("app", "release", "access", "worker"):
        if name in request.DESCRIPTOR.fields_by_name:
            about = getattr(request, name)
            if isinstance(about, str):
                return about
            found: str = about.name if name == "app" else about.app
            return found
    return ""
