"""What each call changes in the config of an app: from its state to the JSON to write by key. No I/O."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from atserving.config import ACCEPT_KEY, MAX_WEIGHT, MUTABLE, Release, app_routing_key, release_key
from atserving.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from registry.admin.history import Change
from registry.admin.state import AppState, access_key, worker_key

Edits = dict[str, str | None]


def put_release(state: AppState, release: Release, given: Collection[str]) -> Edits:
    """Publish a release. If the version exists, change what may change, where it is ``given``.

    Raises AlreadyExists if it exists with other content, InvalidArgument, FailedPrecondition.
    """
    known = state.releases.get(release.version)
    if known is None:
        _check_new(state, release)
        return {release.key: msgspec.structs.replace(release, lastmodified=now()).to_json()}
    if known.digest != release.digest:
        fields = ", ".join(known.differing(release))
        raise AlreadyExists(f"{known.name}/{known.version} exists with a different {fields}: publish a new version")
    return amend_release(state, known.version, {name: getattr(release, name) for name in MUTABLE if name in given})


def amend_release(state: AppState, version: str, changes: Mapping[str, Any]) -> Edits:
    """Change some of the phase, desc, weight and signature of a release (None: remove the field). Raises NotFound."""
    current = release_of(state, version)
    stored = _stored(state, current.key)
    if all((stored.get(name) if value is None else getattr(current, name)) == value for name, value in changes.items()):
        return {}
    return {current.key: _merged(state, current.key, {**changes, "lastmodified": now()})}


def promote(state: AppState, name: str, *, exclusive: bool) -> Edits:
    """Move a version to production, and the others to staging if it is exclusive: then a weight of 0 goes.

    Raises NotFound, FailedPrecondition.
    """
    target = release_of(state, name)
    changes: dict[str, Any] = {"phase": "production"}
    if exclusive and target.weight == 0:
        changes["weight"] = None
    edits = amend_release(state, target.version, changes)
    return edits | _others_to_staging(state, {target.version}) if exclusive else edits


def demote(state: AppState, name: str) -> Edits:
    """Move a version to staging. Raises NotFound."""
    return amend_release(state, release_of(state, name).version, {"phase": "staging"})


def split(state: AppState, weights: Mapping[str, float], *, exclusive: bool) -> Edits:
    """Set the weights of versions, and move them to production.

    Raises NotFound, InvalidArgument, FailedPrecondition.
    """
    for name, weight in weights.items():
        if not 0 <= weight <= MAX_WEIGHT:
            reason = f"{weight:g} should be 0 to {MAX_WEIGHT}"
            raise InvalidArgument(f"weights.{name[:80]}: {reason}", fields={f"weights.{name[:80]}": reason})
    if not weights or not any(weights.values()):
        raise InvalidArgument("weights: none is above 0", fields={"weights": "none is above 0"})
    edits: Edits = {}
    named: set[str] = set()
    for name, weight in weights.items():
        version = release_of(state, name).version
        if version in named:
            raise InvalidArgument(f"weights: {version} is named twice", fields={"weights": f"{version} is named twice"})
        named.add(version)
        edits |= amend_release(state, version, {"phase": "production", "weight": weight})
    return edits | _others_to_staging(state, named) if exclusive else edits


def split_by_capacity(state: AppState) -> Edits:
    """Remove the weights of the versions in production. Raises NotFound."""
    if not state.releases:
        raise NotFound(f"unknown app {state.app!r}")
    edits: Edits = {}
    for each in state.releases.values():
        if each.phase == "production" and each.weight is not None:
            edits |= amend_release(state, each.version, {"weight": None})
    return edits


def _others_to_staging(state: AppState, versions: Collection[str]) -> Edits:
    edits: Edits = {}
    for version in state.versions - set(versions):
        # Gates go on with the last good value, which may be in production.
        _check_well_formed(state, release_key(state.app, version))
        edits |= amend_release(state, version, {"phase": "staging"})
    return edits


def delete_release(state: AppState, version: str, *, force: bool) -> Edits:
    """Delete a release with its worker settings; forced, also the aliases to it. Raises NotFound."""
    key = release_key(state.app, version)
    if key not in state.revisions:
        raise NotFound(f"app {state.app!r} has no version {version!r}")
    edits: Edits = {key: None}
    if worker_key(state.app, version) in state.revisions:
        edits[worker_key(state.app, version)] = None
    aliases = {name: target for name, target in state.routing.aliases.items() if target != version}
    shadow = state.routing.shadow
    if force and (len(aliases) < len(state.routing.aliases) or (shadow and shadow.version == version)):
        changes: dict[str, Any] = {"aliases": aliases or None}
        if shadow and shadow.version == version:
            changes["shadow"] = None
        edits[app_routing_key(state.app)] = _merged(state, app_routing_key(state.app), changes)
    return edits


def delete_app(state: AppState) -> Edits:
    """Delete all config of an app. Raises NotFound."""
    edits: Edits = {key: None for key in state.revisions if "/instance/" not in key}
    if not edits:
        raise NotFound(f"unknown app {state.app!r}")
    return edits


def route(state: AppState, changes: Mapping[str, Any], *, force: bool) -> Edits:
    """Change the aliases, the key header or the shadow of an app, None to remove it. Raises InvalidArgument."""
    key = app_routing_key(state.app)
    _check_well_formed(state, key)
    for alias in changes.get("aliases") or {}:
        if alias in state.releases and alias not in state.routing.aliases:
            reason = f"{alias!r} is a version of the app"
            raise InvalidArgument(f"aliases.{alias}: {reason}", fields={f"aliases.{alias}": reason})
    if not force:
        _check_routing(state, changes, _stored(state, key))
    text = _merged(state, key, {name: value or None for name, value in changes.items()})
    return {key: None if text == "{}" else text}


def set_alias(state: AppState, alias: str, version: str, *, force: bool) -> Edits:
    """Let an alias point to a version. Raises InvalidArgument."""
    return route(state, {"aliases": {**state.routing.aliases, alias: version}}, force=force)


def delete_alias(state: AppState, alias: str) -> Edits:
    """Remove an alias. Raises NotFound."""
    if alias not in state.routing.aliases:
        raise NotFound(f"app {state.app!r} has no alias {alias!r}")
    left = {name: version for name, version in state.routing.aliases.items() if name != alias}
    return route(state, {"aliases": left}, force=True)


def _check_routing(state: AppState, changes: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    for alias, version in (changes.get("aliases") or {}).items():
        if (current.get("aliases") or {}).get(alias) == version:
            continue
        if version not in state.releases:
            reason = f"app {state.app!r} has no version {version!r}"
            raise InvalidArgument(f"aliases.{alias}: {reason}", fields={f"aliases.{alias}": reason})
    if shadow := changes.get("shadow"):
        release = state.releases.get(shadow["version"])
        if release is None or release.phase != "staging":
            reason = f"app {state.app!r} has no version {shadow['version']!r} in staging"
            raise InvalidArgument(f"shadow.version: {reason}", fields={"shadow.version": reason})


def put_access(state: AppState, fields: Mapping[str, Any]) -> Edits:
    """Write the access rules; without any field, delete them."""
    return _replaced(state, access_key(state.app), fields)


def put_worker(state: AppState, version: str, fields: Mapping[str, Any]) -> Edits:
    """Write the worker settings of a level; without any field, delete them. Raises NotFound."""
    if version and version not in state.releases:
        raise NotFound(f"app {state.app!r} has no version {version!r}")
    return _replaced(state, worker_key(state.app, version), fields)


def delete_key(state: AppState, key: str, what: str) -> Edits:
    """Delete a key. Raises NotFound."""
    if key not in state.revisions:
        raise NotFound(f"{state.app or 'the default'} has no {what}")
    return {key: None}


def roll_back(state: AppState, changes: Iterable[Change]) -> Edits:
    """Undo changes, which are sorted, the newest first. Raises FailedPrecondition if the history lacks values."""
    edits: Edits = {}
    for change in changes:
        for key in change.keys:
            if key.key == ACCEPT_KEY:
                continue
            if key.omitted:
                raise FailedPrecondition(
                    f"change {change.revision} can't be undone: its values were too large to keep, or compacted"
                )
            edits[key.key] = key.before
    return edits


def release_of(state: AppState, name: str) -> Release:
    """Return the release that a version or an alias names. Raises NotFound."""
    if version := state.version_of(name):
        return state.releases[version]
    key = release_key(state.app, name)
    if key in state.malformed:
        raise FailedPrecondition(
            f"the value of {key} in etcd is malformed ({state.malformed[key]}): correct or delete it"
        )
    raise NotFound(f"app {state.app!r} has no version {name!r}" if state.releases else f"unknown app {state.app!r}")


def current_access(state: AppState) -> dict[str, Any]:
    """Return the stored fields of the access rules."""
    return _stored(state, access_key(state.app))


def current_worker(state: AppState, version: str) -> dict[str, Any]:
    """Return the stored fields of the worker settings of a level."""
    return _stored(state, worker_key(state.app, version))


def _check_new(state: AppState, release: Release) -> None:
    _check_well_formed(state, release.key)
    if release.version in state.routing.aliases:
        reason = f"{release.version!r} is an alias of the app"
        raise InvalidArgument(f"version: {reason}", fields={"version": reason})


def _check_well_formed(state: AppState, key: str) -> None:
    if reason := state.malformed.get(key):
        raise FailedPrecondition(f"the value of {key} in etcd is malformed ({reason}): correct or delete it")


def _stored(state: AppState, key: str) -> dict[str, Any]:
    entry = state.entries.get(key)
    fields: dict[str, Any] = json.loads(entry.value_json) if entry else {}
    return fields


def _merged(state: AppState, key: str, changes: Mapping[str, Any]) -> str:
    """Return the stored JSON with changes, None to remove a field: an operator may have added fields of their own."""
    fields = {**_stored(state, key), **changes}
    return _text(state, key, {name: value for name, value in fields.items() if value is not None})


def _replaced(state: AppState, key: str, fields: Mapping[str, Any]) -> Edits:
    if not fields:
        return {key: None} if key in state.revisions else {}
    return {key: _text(state, key, fields)}


def _text(state: AppState, key: str, fields: Mapping[str, Any]) -> str:
    """Return fields as JSON: as it is stored, if they are the same."""
    if key in state.entries and key not in state.malformed and fields == _stored(state, key):
        return state.entries[key].value_json
    return as_text(fields)


def as_text(fields: Mapping[str, Any]) -> str:
    """Return fields as the JSON of etcd."""
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def now() -> str:
    """Return the time for ``lastmodified``."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
