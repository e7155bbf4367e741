"""The reading half of the operators' API, from the mirror, which goes on without etcd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Protocol, TypeVar

from google.protobuf.message import Message

from atserving import __version__
from atserving.admin.v1 import admin_pb2
from atserving.config import PREFIX, MalformedConfig, Release, app_of, is_known
from atserving.errors import NotFound, Unavailable
from atserving.misplaced_rules import apps_of
from atserving.tls import Tls
from registry.admin import edits, load, messages, paging, whole
from registry.admin.effects import ineffective
from registry.admin.history import NO_APP, OPERATORS_APP, History
from registry.admin.operators import self_to_proto
from registry.admin.signed import Signatures
from registry.admin.state import AppState
from registry.admin.watching import changed_objects
from registry.comparisons import Comparisons
from registry.mirror import Mirror
from registry.operators import Operators

T = TypeVar("T", bound=Message)
_Wrong = dict[str, tuple[dict[str, str], dict[str, str]]]

_INSTANCES = f"{PREFIX}instance/"
# After so many apps or objects others have their turn, such as heartbeats.
_TURN = 20
# An entry of the history has up to 512 KiB: so many of them are read in one go.
_ENTRIES = 16


class Context(Protocol):
    """What is known of a call beside its request."""

    @property
    def caller(self) -> str:
        """The name of the caller, if it is proven."""

    @property
    def peer_names(self) -> tuple[str, ...]:
        """The URIs in the verified certificate of the peer."""

    @property
    def notes(self) -> dict[str, Any]:
        """Notes on the call, for the audit log."""

    def header(self, name: str) -> str | None:
        """Return a header, or None if it is missing."""


class Reads:
    """The methods that change nothing. They raise ServingErrors; the history is in etcd, so EtcdErrors, too."""

    def __init__(
        self,
        mirror: Mirror,
        history: History,
        comparisons: Comparisons,
        operators: Operators | None,
        signatures: Signatures,
        tls: Tls | None = None,
    ) -> None:
        self._tls = tls
        self._comparisons = comparisons
        self._operators = operators
        self._signatures = signatures
        self._mirror = mirror
        self._view = mirror.view
        self._history = history
        self._wrong_at: tuple[int, int, int] | None = None
        self._by_app: _Wrong = {}

    async def list_apps(self, request: admin_pb2.ListAppsRequest, _: Context) -> admin_pb2.ListAppsResponse:
        page = paging.Page[admin_pb2.App](request.page_size, request.page_token)
        names = [app for app in self._apps(NO_APP) if request.filter in app and app > page.after]
        for turn, app in enumerate(names):
            if not turn % _TURN:
                await asyncio.sleep(0)
            if not page.add(messages.app_to(self._state(app)), app):
                break
        return admin_pb2.ListAppsResponse(apps=page.items, next_page_token=page.token)

    async def get_app(self, request: admin_pb2.GetAppRequest, _: Context) -> admin_pb2.App:
        return messages.app_to(self._existing(request.app))

    async def list_releases(self, request: admin_pb2.ListReleasesRequest, _: Context) -> admin_pb2.ListReleasesResponse:
        phase = messages.phase_from(request.phase, "phase") if request.phase else None

        def releases(state: AppState) -> Iterable[tuple[str, admin_pb2.Release]]:
            return (
                (each.version, messages.release_to(state, each))
                for each in state.releases.values()
                if phase in (None, each.phase) and (request.filter in each.version or request.filter in each.desc)
            )

        page = paging.Page[admin_pb2.Release](request.page_size, request.page_token)
        await self._fill(page, request.app, releases)
        return admin_pb2.ListReleasesResponse(releases=page.items, next_page_token=page.token)

    async def get_release(self, request: admin_pb2.GetReleaseRequest, _: Context) -> admin_pb2.Release:
        state = self._existing(request.app)
        return messages.release_to(state, edits.release_of(state, request.version))

    async def get_access(self, request: admin_pb2.GetAccessRequest, _: Context) -> admin_pb2.Access:
        app = messages.app_from(request.app)
        access = messages.access_to(self._state(app))
        access.warnings.extend(f"{key}: {reason}" for key, reason in self._misplaced() if app in apps_of(key))
        return access

    async def get_worker(self, request: admin_pb2.GetWorkerRequest, _: Context) -> admin_pb2.Worker:
        return messages.worker_to(self._state(messages.app_from(request.app)), messages.version_from(request.version))

    async def get_merged_worker(self, request: admin_pb2.GetMergedWorkerRequest, _: Context) -> admin_pb2.MergedWorker:
        state = self._existing(request.app)
        release = edits.release_of(state, request.version)
        return messages.merged_worker(self._state(""), state, release.version)

    async def list_instances(
        self, request: admin_pb2.ListInstancesRequest, _: Context
    ) -> admin_pb2.ListInstancesResponse:
        def instances(state: AppState) -> Iterable[tuple[str, admin_pb2.InstanceStatus]]:
            version = state.version_of(request.version) or request.version
            chosen = [name for name in state.instances if version in ("", name)]
            named = sorted((f"{name}/{each.id}", each) for name in chosen for each in state.instances[name])
            return ((name, messages.instance_to(state, each)) for name, each in named)

        page = paging.Page[admin_pb2.InstanceStatus](request.page_size, request.page_token)
        await self._fill(page, request.app, instances)
        if request.load:
            await load.ask(page.items, self._tls)
        return admin_pb2.ListInstancesResponse(instances=page.items, next_page_token=page.token)

    async def list_history(self, request: admin_pb2.ListHistoryRequest, _: Context) -> admin_pb2.ListHistoryResponse:
        app = request.app if request.app in (NO_APP, OPERATORS_APP) else messages.app_from(request.app)
        page = paging.Page[admin_pb2.Change](request.page_size, request.page_token)
        before = messages.revision_from(page.after) if page.after else 0
        while found := await self._history.newest(app, _ENTRIES, before):
            if not all(page.add(messages.change_to(each), str(each.created)) for each in found):
                break
            before = found[-1].created
        if not page.items and app not in ("", NO_APP, OPERATORS_APP):
            # An app that is gone may have a history.
            self._existing(app)
        return admin_pb2.ListHistoryResponse(changes=page.items, next_page_token=page.token)

    async def list_problems(self, request: admin_pb2.ListProblemsRequest, _: Context) -> admin_pb2.ListProblemsResponse:
        self._require_synced()
        if request.app != NO_APP:
            messages.name_from(request.app, "app")
        kinds = admin_pb2.ListProblemsResponse
        held = dict.fromkeys(self._view.holdback.held, "deleted in etcd with most others, and still in use")
        response = kinds()
        for kind, reasons in (
            (kinds.KIND_MALFORMED, self._view.malformed | self._malformed_operators(request.app)),
            (kinds.KIND_UNKNOWN_FIELDS, self._view.warnings),
            (kinds.KIND_DELETION_HELD, held),
            (kinds.KIND_INEFFECTIVE, await self._ineffective(request.app)),
            (kinds.KIND_UNTRUSTED, await self._untrusted(request.app)),
        ):
            for key, reason in sorted(reasons.items()):
                if request.app == NO_APP or _app_of(key) in ("", request.app):
                    response.problems.add(kind=kind, key=key, reason=reason)
        return response

    def _malformed_operators(self, app: str) -> dict[str, str]:
        return self._operators.roster.malformed if self._operators and app == NO_APP else {}

    async def get_self(self, _: admin_pb2.GetSelfRequest, context: Context) -> admin_pb2.Operator:
        return self_to_proto(self._operators.identify(context)) if self._operators else admin_pb2.Operator()

    async def get_status(self, _: admin_pb2.GetStatusRequest, context: Context) -> admin_pb2.Status:
        view = self._view
        stale = self._mirror.reason if view.stale or not view.synced.is_set() else ""
        status = admin_pb2.Status(software=__version__, revision=view.revision, stale=stale, operator=context.caller)
        status.time.GetCurrentTime()
        return status

    async def get_config(self, request: admin_pb2.GetConfigRequest, _: Context) -> admin_pb2.Config:
        if request.app:
            return whole.to_proto(self._existing(request.app))
        return whole.to_proto(self._state(""))

    async def list_comparisons(
        self, request: admin_pb2.ListComparisonsRequest, _: Context
    ) -> admin_pb2.ListComparisonsResponse:
        state = self._existing(request.app)
        version = edits.release_of(state, request.version).version if request.version else ""
        digests = {each.version: each.digest for each in state.releases.values()}
        found = self._comparisons.of(request.app, lambda name: digests.get(name, "-"), state.routing.shadow)
        chosen = [messages.comparison_to(each) for each in found if version in ("", each.version)]
        return admin_pb2.ListComparisonsResponse(comparisons=chosen)

    async def _ineffective(self, app: str) -> dict[str, str]:
        found: dict[str, str] = {}
        view = self._view
        for turn, name in enumerate(list(view.by_app) if app == NO_APP else ["", app]):
            if not turn % _TURN:
                await asyncio.sleep(0)
            keys = [key for key in view.by_app.get(name, ()) if not key.startswith(_INSTANCES)]
            malformed, _ = self._wrong().get(name, ({}, {}))
            found |= ineffective(name, {key: view.entries[key].value for key in keys}, malformed)
        return found

    async def _untrusted(self, app: str) -> dict[str, str]:
        found: dict[str, str] = {}
        view = self._view
        why = self._signatures.judge()
        for turn, name in enumerate(list(view.by_app) if app == NO_APP else [app]):
            if not turn % _TURN:
                await asyncio.sleep(0)
            for key in view.by_app.get(name, ()):
                value = view.entries[key].value
                if isinstance(value, Release) and (reason := why(value)):
                    found[key] = reason
        return found

    async def watch_app(
        self, request: admin_pb2.WatchAppRequest, _: Context
    ) -> AsyncIterator[admin_pb2.WatchAppResponse]:
        self._require_synced()
        app = "" if request.app == NO_APP else messages.name_from(request.app, "app")
        with self._view.subscribe(app, rewritten=True) as subscription:
            known: dict[str, admin_pb2.WatchAppResponse] = {}
            synced = False
            while (delta := await subscription.next()) is not None:
                for turn, response in enumerate(changed_objects(delta, known, self._state, app)):
                    if not turn % _TURN:
                        await asyncio.sleep(0)
                    yield response
                if not synced:
                    synced = True
                    yield admin_pb2.WatchAppResponse(synced=True)
        raise Unavailable("the registry is stopping")

    async def _fill(
        self, page: paging.Page[T], app: str, items_of: Callable[[AppState], Iterable[tuple[str, T]]]
    ) -> None:
        """Fill a page with what apps have. It looks only at the apps of the page.

        ``items_of`` yields the names and items of an app, sorted. Raises InvalidArgument, Unavailable.
        """
        first, _, last = page.after.partition("/")
        for turn, name in enumerate(self._apps(app)):
            if name < first:
                continue
            if not turn % _TURN:
                await asyncio.sleep(0)
            for item_name, item in items_of(self._state(name)):
                if (name != first or item_name > last) and not page.add(item, f"{name}/{item_name}"):
                    return

    def _require_synced(self) -> None:
        if not self._view.synced.is_set():
            raise Unavailable(f"this registry has no config yet; etcd is unreachable: {self._mirror.reason}")

    def _apps(self, app: str) -> list[str]:
        """Return the apps that a request names, sorted. Raises InvalidArgument, Unavailable."""
        self._require_synced()
        if app != NO_APP:
            return [self._existing(app, or_instances=True).app]
        malformed = {_app_of(key) for key in self._view.malformed}
        return sorted((self._view.by_app.keys() | malformed) - {""})

    def _existing(self, app: str, *, or_instances: bool = False) -> AppState:
        """Return the state of an app that has config, or instances. Raises NotFound, InvalidArgument, Unavailable."""
        state = self._state(messages.name_from(app, "app"))
        if not state.exists and not (or_instances and state.instances):
            raise NotFound(f"unknown app {app!r}")
        return state

    def _state(self, app: str) -> AppState:
        self._require_synced()
        view = self._view
        entries = {key: view.entries[key] for key in view.by_app.get(app, ())}
        malformed, warnings = self._wrong().get(app, ({}, {}))
        state = AppState(app, entries, malformed)
        state.revisions |= {key: view.malformed_at[key] for key in malformed}
        state.warnings = dict(warnings)
        state.warn(state.ineffective())
        return state

    def _misplaced(self) -> Iterable[tuple[str, str]]:
        """Return the unknown keys that close apps, sorted, and the reasons."""
        view = self._view
        return sorted(
            (key, view.malformed[key]) for key in view.malformed.keys() & view.entries.keys() if not is_known(key)
        )

    def _wrong(self) -> _Wrong:
        """Return the malformed values and the warnings by app, grouped once for each state of the view."""
        view = self._view
        at = (view.revision, len(view.malformed), len(view.warnings))
        if at != self._wrong_at:
            self._wrong_at, self._by_app = at, {}
            for number, reasons in enumerate((view.malformed, view.warnings)):
                for key, reason in reasons.items():
                    self._by_app.setdefault(_app_of(key), ({}, {}))[number][key] = reason
        return self._by_app


def _app_of(key: str) -> str:
    """Return the app of a key of any kind; empty for the defaults and for unknown keys."""
    try:
        return app_of(key) or ""
    except MalformedConfig:
        return ""
