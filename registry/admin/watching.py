"""The objects of the API that a step of the mirror changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

from atserving.admin.v1 import admin_pb2
from atserving.config import PREFIX, MalformedConfig, app_of
from registry.admin import messages
from registry.admin.state import AppState
from registry.view import Delta

Responses = dict[str, admin_pb2.WatchAppResponse]


def changed_objects(
    delta: Delta, known: Responses, state_of: Callable[[str], AppState], app: str
) -> Iterator[admin_pb2.WatchAppResponse]:
    """Yield what a subscriber of an app (empty: all) has to hear of a step. ``known`` is what it has heard before."""
    keys = {*delta.upserts, *delta.deletes, *delta.rewritten}
    if delta.reset:
        keys |= known.keys() - {name for name in known if name.startswith(_APP)}
    apps: dict[str, set[str]] = {}
    for key in keys:
        with suppress(MalformedConfig):
            apps.setdefault(app_of(key) or "", set()).add(key)
    for name in sorted(apps):
        if name == "" and app:
            # The defaults are no objects of an app.
            continue
        state = state_of(name)
        if name:
            yield from _told(f"{_APP}{name}", _app(state), known)
        # The counts of a release follow its instances.
        touched = apps[name] | {release.key for release in state.releases.values()}
        if any(key.startswith(f"{PREFIX}eval/") for key in apps[name]):
            # Whether an instance is outdated follows its release.
            touched |= {each.key for instances in state.instances.values() for each in instances}
        for key in sorted(touched):
            yield from _told(key, _object(state, key), known)


_APP = "app:"


def _told(
    name: str, found: admin_pb2.WatchAppResponse | None, known: Responses
) -> Iterator[admin_pb2.WatchAppResponse]:
    before = known.get(name)
    if found is None:
        if before:
            del known[name]
            yield _deletion(before)
    elif found != before:
        known[name] = found
        yield found


def _app(state: AppState) -> admin_pb2.WatchAppResponse | None:
    return admin_pb2.WatchAppResponse(app=messages.app_to(state)) if state.exists else None


def _object(state: AppState, key: str) -> admin_pb2.WatchAppResponse | None:
    if key not in state.entries:
        return None
    response = admin_pb2.WatchAppResponse
    match key.removeprefix(PREFIX).split("/"):
        case ["eval", _, version]:
            return response(release=messages.release_to(state, state.releases[version]))
        case ["app", "metadata", _] | ["app", "default", "metadata"]:
            return response(access=messages.access_to(state))
        case ["worker", "app", _, "release", version]:
            return response(worker=messages.worker_to(state, version))
        case ["worker", *_]:
            return response(worker=messages.worker_to(state, ""))
        case ["instance", _, version, id_]:
            one = next(each for each in state.instances[version] if each.id == id_)
            return response(instance=messages.instance_to(state, one))
    return None


def _deletion(before: admin_pb2.WatchAppResponse) -> admin_pb2.WatchAppResponse:
    gone = admin_pb2.WatchAppResponse(deleted=True)
    match before.WhichOneof("object"):
        case "app":
            gone.app.name = before.app.name
        case "release":
            gone.release.app, gone.release.version = before.release.app, before.release.version
        case "access":
            gone.access.app = before.access.app
            gone.access.SetInParent()
        case "worker":
            gone.worker.app, gone.worker.version = before.worker.app, before.worker.version
            gone.worker.SetInParent()
        case "instance":
            gone.instance.app, gone.instance.version = before.instance.app, before.instance.version
            gone.instance.id = before.instance.id
    return gone
