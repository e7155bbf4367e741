"""Decides who may call an app, by its metadata in etcd, which overrides the default field by field."""

from __future__ import annotations

from dataclasses import dataclass

from atserving.config import AppMetadata
from atserving.errors import PermissionDenied, Unauthenticated


@dataclass(frozen=True)
class Caller:
    """The sender of a request."""

    uid: int | None = None
    """None: the request carries no proven identity."""


def admit(caller: Caller, app: str, own: AppMetadata, default: AppMetadata) -> None:
    """Return if the caller may use the app. Raises Unauthenticated or PermissionDenied.

    An app is public unless its metadata or the default says otherwise. Metadata with an owner or a whitelist but
    without ``public`` closes the app.
    """
    for metadata in (own, default):
        if metadata.public is not None:
            public = metadata.public
            break
        if metadata.owner or metadata.user_whitelist is not None:
            public = False
            break
    else:
        public = True
    if public:
        return
    if caller.uid is None:
        raise Unauthenticated(f"app {app!r} is not public, and the request carries no credentials")
    owner = own.owner or default.owner
    whitelist = own.user_whitelist if own.user_whitelist is not None else default.user_whitelist or ()
    if not (owner and owner.uid == caller.uid) and caller.uid not in whitelist:
        raise PermissionDenied(f"this caller may not use app {app!r}")
