"""Who may call an app: its metadata in etcd, field by field over the default's."""

from __future__ import annotations

from dataclasses import dataclass

from atserving.config import AppMetadata
from atserving.errors import PermissionDenied, Unauthenticated


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    uid: int | None = None
    """None: nobody said, or proved, who it is."""


def admit(caller: Caller, app: str, own: AppMetadata, default: AppMetadata) -> None:
    """Returns where the caller may use the app. Raises Unauthenticated or PermissionDenied.

    An app is public unless its metadata, or the default's, says otherwise; metadata that names an owner or a whitelist
    without saying `public` means a closed app.
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
