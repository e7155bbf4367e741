"""The config of an app as a whole: what etcd has of it, and what makes it what somebody wants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from atserving.admin.v1 import admin_pb2
from atserving.config import PREFIX, MalformedConfig, Release, app_of, read
from atserving.errors import AlreadyExists, InvalidArgument
from registry.admin.edits import Edits, as_text, now
from registry.admin.state import AppState

_NO_CONFIG = (f"{PREFIX}instance/", f"{PREFIX}deletions/")


def to_proto(state: AppState) -> admin_pb2.Config:
    """Return all config of an app, or of the defaults."""
    values = {key: each.value_json for key, each in state.entries.items() if not key.startswith(_NO_CONFIG)}
    warnings = [f"{key}: {reason}" for key, reason in sorted(state.malformed.items())]
    return admin_pb2.Config(app=state.app, etag=state.etag, values=values, warnings=warnings)


def apply(state: AppState, wanted: Mapping[str, str], *, prune: bool) -> Edits:
    """Make the config what ``wanted`` says, which has the JSON of each key. With ``prune``, nothing else is left.

    Raises InvalidArgument for a key of another app, and AlreadyExists for a release with other content than is
    published.
    """
    edits: Edits = {}
    for key, text in sorted(wanted.items()):
        _check_key(state, key)
        try:
            value, _ = read(key, text)
        except MalformedConfig as error:
            raise InvalidArgument(f"{key}: {error}", fields={key: str(error)}) from None
        entry = state.entries.get(key)
        before = entry.value if entry and key not in state.malformed else None
        if isinstance(before, Release) and isinstance(value, Release) and before.digest != value.digest:
            differing = ", ".join(before.differing(value))
            raise AlreadyExists(
                f"{state.app}/{value.version} exists with a different {differing}: publish a new version"
            )
        fields = _wanted(orjson.loads(text), value)
        if entry is None or before is None or _wanted(orjson.loads(entry.value_json), before) != fields:
            if isinstance(value, Release):
                fields["lastmodified"] = now()
            edits[key] = as_text(fields)
    if prune:
        edits |= {key: None for key in state.revisions if key not in wanted and not key.startswith(_NO_CONFIG)}
    return edits


def changes(state: AppState, edits: Mapping[str, str | None]) -> list[admin_pb2.KeyChange]:
    """Return what edits change in a state, sorted by key."""
    found = []
    for key, after in sorted(edits.items()):
        entry = state.entries.get(key)
        change = admin_pb2.KeyChange(key=key, before=entry.value_json if entry else None, after=after)
        found.append(change)
    return found


def _wanted(fields: dict[str, Any], value: object) -> dict[str, Any]:
    """Return the fields that somebody decides about."""
    if not isinstance(value, Release):
        return fields
    given = {name: each for name, each in fields.items() if name != "lastmodified"}
    return {"name": value.name, "version": value.version, "phase": value.phase, **given}


def _check_key(state: AppState, key: str) -> None:
    """Raise InvalidArgument unless a key is config of this app."""
    try:
        app = app_of(key) or ""
    except MalformedConfig:
        app = None
    if app != state.app or key.startswith(_NO_CONFIG):
        whose = f"app {state.app!r}" if state.app else "the defaults"
        raise InvalidArgument(f"{key[:200]} is no config of {whose}", fields={"values": f"{key[:200]}: not of {whose}"})
