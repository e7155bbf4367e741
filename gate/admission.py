"""Decides who may call an app, by its metadata in etcd, which overrides the default field by field."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

import orjson

from atserving.config import AppMetadata
from atserving.errors import PermissionDenied, Unauthenticated


@dataclass(frozen=True)
class Caller:
    """The sender of a request."""

    uid: int | None = None
    """None: it is unknown."""
    raw_groups: bytes = b""
    """The groups as Envoy passes them: names with commas or spaces between them, or a JSON list in base64."""
    proven: bool = False
    """Whether the request carries a proven identity."""
    challenge: str = "Bearer"
    """The schemes by which the caller can prove it."""

    @property
    def groups(self) -> frozenset[str]:
        """The names of the caller's groups."""
        try:
            padded = self.raw_groups + b"=" * (-len(self.raw_groups) % 4)
            names = orjson.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
            if isinstance(names, list):
                return frozenset(name for name in names if isinstance(name, str))
        except (binascii.Error, orjson.JSONDecodeError):
            pass
        return frozenset(self.raw_groups.decode(errors="replace").replace(",", " ").split())


def admit(caller: Caller, app: str, own: AppMetadata, default: AppMetadata) -> None:
    """Return if the caller may use the app. Raises Unauthenticated or PermissionDenied.

    An app is public unless its metadata or the default says otherwise. Metadata with an owner or a whitelist but
    without ``public`` closes the app.
    """
    for metadata in (own, default):
        if metadata.public is not None:
            public = metadata.public
            break
        if metadata.says_who:
            public = False
            break
    else:
        public = True
    if public:
        return
    if not caller.proven:
        message = f"app {app!r} is not public, and the request carries no credentials"
        raise Unauthenticated(message, challenge=caller.challenge)
    if not _is_named(caller, own, default):
        raise PermissionDenied(f"this caller may not use app {app!r}")


def _is_named(caller: Caller, own: AppMetadata, default: AppMetadata) -> bool:
    owner = own.owner or default.owner
    users = own.user_whitelist if own.user_whitelist is not None else default.user_whitelist or ()
    if caller.uid is not None and ((owner and owner.uid == caller.uid) or caller.uid in users):
        return True
    groups = own.group_whitelist if own.group_whitelist is not None else default.group_whitelist or ()
    return bool(groups) and not caller.groups.isdisjoint(groups)
