"""The API of operators: reads from the mirror, and writes to etcd."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any, Protocol

from google.protobuf.duration_pb2 import Duration

from atserving.admin.v1 import admin_pb2
from atserving.config import Instance, MalformedConfig, Release, app_of, validate
from atserving.errors import InvalidArgument, NotFound, Unavailable
from registry.admin import edits, load, messages, paging
from registry.admin.history import NO_APP, History
from registry.admin.state import AppState, access_key, worker_key
from registry.admin.watching import changed_objects
from registry.admin.writes import ACCEPT_S, Intent, Writer
from registry.mirror import Mirror

_WRONG_DIGEST = re.compile(r"#sha256=(?![0-9A-Fa-f]{64}$)")
_APP_MASK = ("aliases", "key_header", "shadow")
_RELEASE_MASK = ("phase", "desc", "weight")
_ACCESS_MASK = ("public", "owner", "user_whitelist")
_WORKER_MASK = ("timeout", "max_concurrent", "delay4batch")


class Context(Protocol):
    """What is known of a call beside its request."""

    def header(self, name: str) -> str | None:
        """Return a header, or None if it is missing."""


class _Write(Protocol):
    """The fields that all requests for a change have."""

    validate_only: bool
    force: bool
    message: str
    actor: str


class AdminService:
    """The methods of the API, one for each rpc. They raise ServingErrors, and EtcdErrors."""

    def __init__(self, mirror: Mirror, writer: Writer, history: History) -> None:
        self._mirror = mirror
        self._view = mirror.view
        self._writer = writer
        self._history = history

    # Apps

    async def list_apps(self, request: admin_pb2.ListAppsRequest, _: Context) -> admin_pb2.ListAppsResponse:
        names = [app for app in self._apps(NO_APP) if request.filter in app]
        found, token = paging.page(names, str, request.page_size, request.page_token)
        return admin_pb2.ListAppsResponse(
            apps=[messages.app_to(self._state(app)) for app in found], next_page_token=token
        )

    async def get_app(self, request: admin_pb2.GetAppRequest, _: Context) -> admin_pb2.App:
        return messages.app_to(self._existing(request.app))

    async def update_app(self, request: admin_pb2.UpdateAppRequest, _: Context) -> admin_pb2.App:
        app = request.app
        name = messages.name_from(app.name, "app.name")
        fields: dict[str, Any] = {}
        if app.aliases:
            fields["aliases"] = dict(app.aliases)
        if app.key_header:
            fields["key_header"] = app.key_header
        if app.HasField("shadow"):
            fields["shadow"] = {"version": app.shadow.version, "percent": app.shadow.percent}
        wanted = messages.wanted(fields, request.update_mask.paths, _APP_MASK)
        changes = {path: fields.get(path) for path in wanted}
        intent = _intent("UpdateApp", request, app.etag)
        state = await self._writer.write(name, intent, lambda state: edits.route(state, changes, force=request.force))
        return messages.app_to(state)

    async def set_alias(self, request: admin_pb2.SetAliasRequest, _: Context) -> admin_pb2.App:
        app = messages.name_from(request.app, "app")
        alias = messages.name_from(request.alias, "alias")
        version = messages.name_from(request.version, "version")
        state = await self._writer.write(
            app,
            _intent("SetAlias", request, request.etag),
            lambda state: edits.set_alias(state, alias, version, force=request.force),
        )
        return messages.app_to(state)

    async def delete_alias(self, request: admin_pb2.DeleteAliasRequest, _: Context) -> admin_pb2.App:
        app = messages.name_from(request.app, "app")
        state = await self._writer.write(
            app,
            _intent("DeleteAlias", request, request.etag),
            lambda state: edits.delete_alias(state, request.alias),
        )
        return messages.app_to(state)

    async def delete_app(self, request: admin_pb2.DeleteAppRequest, _: Context) -> admin_pb2.DeleteAppResponse:
        app = messages.name_from(request.app, "app")
        await self._writer.write(app, _intent("DeleteApp", request, request.etag), edits.delete_app)
        return admin_pb2.DeleteAppResponse()

    async def split_app(self, request: admin_pb2.SplitAppRequest, _: Context) -> admin_pb2.App:
        app = messages.name_from(request.app, "app")
        weights = dict(request.weights)
        state = await self._writer.write(
            app,
            _intent("SplitApp", request, request.etag),
            lambda state: edits.split(state, weights, exclusive=request.exclusive),
        )
        return messages.app_to(state)

    async def rollback_app(self, request: admin_pb2.RollbackAppRequest, _: Context) -> admin_pb2.App:
        app = messages.name_from(request.app, "app")
        if request.revision:
            revision = _revision(request.revision)
        else:
            last = await self._history.newest(app, 1)
            if not last:
                raise NotFound(f"app {app!r} has no history")
            revision = last[0].revision
        undone = await self._history.since(app, revision)
        if not undone or undone[-1].revision != revision:
            raise NotFound(f"app {app!r} has no change {revision} in its history")
        state = await self._writer.write(
            app, _intent("RollbackApp", request, request.etag), lambda state: edits.roll_back(state, undone)
        )
        return messages.app_to(state)

    # Releases

    async def list_releases(self, request: admin_pb2.ListReleasesRequest, _: Context) -> admin_pb2.ListReleasesResponse:
        phase = messages.phase_from(request.phase, "phase") if request.phase else None
        wanted = [
            (state, release)
            for state in map(self._state, self._apps(request.app))
            for release in state.releases.values()
            if phase in (None, release.phase) and (request.filter in release.version or request.filter in release.desc)
        ]
        found, token = paging.page(
            wanted, lambda each: f"{each[1].name}/{each[1].version}", request.page_size, request.page_token
        )
        return admin_pb2.ListReleasesResponse(
            releases=[messages.release_to(state, release) for state, release in found], next_page_token=token
        )

    async def get_release(self, request: admin_pb2.GetReleaseRequest, _: Context) -> admin_pb2.Release:
        state = self._existing(request.app)
        return messages.release_to(state, edits.release_of(state, request.version))

    async def create_release(self, request: admin_pb2.CreateReleaseRequest, _: Context) -> admin_pb2.Release:
        release, given = _release(request.release)
        state = await self._writer.write(
            release.name,
            _intent("CreateRelease", request, ""),
            lambda state: edits.put_release(state, release, given),
            lambda state: state.etag_of(release.key),
        )
        return messages.release_to(state, state.releases[release.version])

    async def update_release(self, request: admin_pb2.UpdateReleaseRequest, _: Context) -> admin_pb2.Release:
        message = request.release
        paths = list(request.update_mask.paths)
        given = messages.release_fields(message)
        if wrong := [name for name in paths or given if name not in (*_RELEASE_MASK, "name", "version", "file")]:
            raise InvalidArgument(
                f"{', '.join(wrong)}: the content of a release never changes: publish a new version",
                fields=dict.fromkeys(wrong, "never changes"),
            )
        given = {name: value for name, value in given.items() if name in _RELEASE_MASK}
        changes = {name: given.get(name) for name in messages.wanted(given, paths, _RELEASE_MASK)}
        return await self._change_release(
            "UpdateRelease",
            message.app,
            message.version,
            request,
            message.etag,
            lambda state: edits.amend_release(state, message.version, changes),
        )

    async def promote_release(self, request: admin_pb2.PromoteReleaseRequest, _: Context) -> admin_pb2.Release:
        return await self._change_release(
            "PromoteRelease",
            request.app,
            request.version,
            request,
            request.etag,
            lambda state: edits.promote(state, request.version, exclusive=request.exclusive),
        )

    async def demote_release(self, request: admin_pb2.DemoteReleaseRequest, _: Context) -> admin_pb2.Release:
        return await self._change_release(
            "DemoteRelease",
            request.app,
            request.version,
            request,
            request.etag,
            lambda state: edits.demote(state, request.version),
        )

    async def _change_release(
        self,
        method: str,
        app: str,
        name: str,
        request: _Write,
        etag: str,
        edit: Callable[[AppState], edits.Edits],
    ) -> admin_pb2.Release:
        messages.name_from(app, "app")
        messages.name_from(name, "version")
        state = await self._writer.write(
            app,
            _intent(method, request, etag),
            edit,
            lambda state: state.etag_of(edits.release_of(state, name).key),
        )
        return messages.release_to(state, edits.release_of(state, name))

    async def delete_release(
        self, request: admin_pb2.DeleteReleaseRequest, _: Context
    ) -> admin_pb2.DeleteReleaseResponse:
        app = messages.name_from(request.app, "app")
        version = messages.name_from(request.version, "version")
        await self._writer.write(
            app,
            _intent("DeleteRelease", request, request.etag),
            lambda state: edits.delete_release(state, version, force=request.force),
            lambda state: state.etag_of(edits.release_of(state, version).key),
        )
        return admin_pb2.DeleteReleaseResponse()

    # Access rules

    async def get_access(self, request: admin_pb2.GetAccessRequest, _: Context) -> admin_pb2.Access:
        return messages.access_to(self._state(_app(request.app)))

    async def update_access(self, request: admin_pb2.UpdateAccessRequest, _: Context) -> admin_pb2.Access:
        fields = messages.access_fields(request.access)
        paths = list(request.update_mask.paths)
        app = _app(request.access.app)
        state = await self._writer.write(
            app,
            _intent("UpdateAccess", request, request.access.etag),
            lambda state: edits.put_access(
                state, messages.masked(fields, paths, _ACCESS_MASK, edits.current_access(state))
            ),
            lambda state: state.etag_of(access_key(app)),
        )
        return messages.access_to(state)

    async def delete_access(self, request: admin_pb2.DeleteAccessRequest, _: Context) -> admin_pb2.DeleteAccessResponse:
        await self._delete("DeleteAccess", _app(request.app), "access rules", access_key, request, request.etag)
        return admin_pb2.DeleteAccessResponse()

    # Worker settings

    async def get_worker(self, request: admin_pb2.GetWorkerRequest, _: Context) -> admin_pb2.Worker:
        return messages.worker_to(self._state(_app(request.app)), _version(request.version))

    async def update_worker(self, request: admin_pb2.UpdateWorkerRequest, _: Context) -> admin_pb2.Worker:
        message = request.worker
        app, version = _app(message.app), _version(message.version)
        fields = messages.worker_fields(message)
        paths = list(request.update_mask.paths)
        state = await self._writer.write(
            app,
            _intent("UpdateWorker", request, message.etag),
            lambda state: edits.put_worker(
                state, version, messages.masked(fields, paths, _WORKER_MASK, edits.current_worker(state, version))
            ),
            lambda state: state.etag_of(worker_key(app, version)),
        )
        return messages.worker_to(state, version)

    async def delete_worker(self, request: admin_pb2.DeleteWorkerRequest, _: Context) -> admin_pb2.DeleteWorkerResponse:
        version = _version(request.version)
        await self._delete(
            "DeleteWorker",
            _app(request.app),
            "worker settings",
            lambda app: worker_key(app, version),
            request,
            request.etag,
        )
        return admin_pb2.DeleteWorkerResponse()

    async def _delete(
        self, method: str, app: str, what: str, key_of: Callable[[str], str], request: _Write, etag: str
    ) -> None:
        key = key_of(app)
        await self._writer.write(
            app,
            _intent(method, request, etag),
            lambda state: edits.delete_key(state, key, what),
            lambda state: state.etag_of(key),
        )

    async def get_merged_worker(self, request: admin_pb2.GetMergedWorkerRequest, _: Context) -> admin_pb2.MergedWorker:
        state = self._existing(request.app)
        release = edits.release_of(state, request.version)
        return messages.merged_worker(self._state(""), state, release.version)

    # Instances, history, problems

    async def list_instances(
        self, request: admin_pb2.ListInstancesRequest, _: Context
    ) -> admin_pb2.ListInstancesResponse:
        wanted: list[tuple[AppState, Instance]] = []
        for state in map(self._state, self._apps(request.app)):
            version = state.version_of(request.version) or request.version
            wanted += [
                (state, each)
                for of_version, instances in state.instances.items()
                if version in ("", of_version)
                for each in instances
            ]
        found, token = paging.page(wanted, lambda each: each[1].key, request.page_size, request.page_token)
        statuses = [messages.instance_to(state, instance) for state, instance in found]
        if request.load:
            await load.ask(statuses)
        return admin_pb2.ListInstancesResponse(instances=statuses, next_page_token=token)

    async def list_history(self, request: admin_pb2.ListHistoryRequest, _: Context) -> admin_pb2.ListHistoryResponse:
        app = request.app if request.app == NO_APP else messages.name_from(request.app, "app")
        size = paging.size_of(request.page_size)
        before = paging.read(request.page_token)
        found = await self._history.newest(app, size, _revision(before) if before else 0)
        return admin_pb2.ListHistoryResponse(
            changes=[messages.change_to(each) for each in found],
            next_page_token=paging.write(str(found[-1].created)) if len(found) == size else "",
        )

    async def list_problems(self, request: admin_pb2.ListProblemsRequest, _: Context) -> admin_pb2.ListProblemsResponse:
        self._require_synced()
        if request.app != NO_APP:
            messages.name_from(request.app, "app")
        kinds = admin_pb2.ListProblemsResponse
        held = dict.fromkeys(self._view.holdback.held, "deleted in etcd with most others, and still in use")
        response = kinds()
        for kind, reasons in (
            (kinds.KIND_MALFORMED, self._view.malformed),
            (kinds.KIND_UNKNOWN_FIELDS, self._view.warnings),
            (kinds.KIND_DELETION_HELD, held),
        ):
            for key, reason in sorted(reasons.items()):
                if request.app == NO_APP or _app_of(key) in ("", request.app):
                    response.problems.add(kind=kind, key=key, reason=reason)
        return response

    async def watch_app(
        self, request: admin_pb2.WatchAppRequest, _: Context
    ) -> AsyncIterator[admin_pb2.WatchAppResponse]:
        self._require_synced()
        app = "" if request.app == NO_APP else messages.name_from(request.app, "app")
        with self._view.subscribe(app) as subscription:
            known: dict[str, admin_pb2.WatchAppResponse] = {}
            synced = False
            while delta := await subscription.next():
                for response in changed_objects(delta, known, self._state, app):
                    yield response
                if not synced:
                    synced = True
                    yield admin_pb2.WatchAppResponse(synced=True)
        raise Unavailable("the registry is stopping")

    async def accept_deletions(
        self, request: admin_pb2.AcceptDeletionsRequest, _: Context
    ) -> admin_pb2.AcceptDeletionsResponse:
        await self._writer.accept_deletions(request.actor, request.message)
        return admin_pb2.AcceptDeletionsResponse(ttl=Duration(seconds=ACCEPT_S))

    # The mirror's state

    def _require_synced(self) -> None:
        if not self._view.synced.is_set():
            raise Unavailable(f"this registry has no config yet; etcd is unreachable: {self._mirror.reason}")

    def _apps(self, app: str) -> list[str]:
        """Return the apps that a request names, sorted. Raises InvalidArgument, Unavailable."""
        self._require_synced()
        if app != NO_APP:
            return [messages.name_from(app, "app")]
        malformed = {_app_of(key) for key in self._view.malformed}
        return sorted((self._view.by_app.keys() | malformed) - {""})

    def _existing(self, app: str) -> AppState:
        """Return the state of an app. Raises NotFound, InvalidArgument, Unavailable."""
        state = self._state(messages.name_from(app, "app"))
        if not state.exists:
            raise NotFound(f"unknown app {app!r}")
        return state

    def _state(self, app: str) -> AppState:
        self._require_synced()
        view = self._view
        entries = {key: view.entries[key] for key in view.by_app.get(app, ())}
        malformed = {key: reason for key, reason in view.malformed.items() if _app_of(key) == app}
        state = AppState(app, entries, malformed)
        state.warnings = {key: reason for key, reason in view.warnings.items() if _app_of(key) == app}
        return state


def _release(message: admin_pb2.Release) -> tuple[Release, Collection[str]]:
    """Return the release to publish, and the fields that the message sets. Raises InvalidArgument."""
    messages.name_from(message.app, "app")
    messages.name_from(message.version, "version")
    fields = messages.release_fields(message)
    for field, uri in {
        "file": message.file,
        **{f"custom_files.{n}": u for n, u in message.custom_files.items()},
    }.items():
        if _WRONG_DIGEST.search(uri):
            reason = "#sha256= should be followed by 64 hexadecimal digits"
            raise InvalidArgument(f"{field}: {reason}", fields={field: reason})
    try:
        return validate(Release, fields), fields.keys()
    except MalformedConfig as error:
        field, _, reason = str(error).partition(": ")
        raise InvalidArgument(str(error), fields={field: reason}) from None


def _intent(method: str, request: _Write, etag: str) -> Intent:
    _check_texts(request)
    return Intent(method, etag, request.validate_only, request.force, request.message, request.actor)


def _check_texts(request: _Write) -> None:
    for name, most in (("message", 1000), ("actor", 200)):
        if len(getattr(request, name)) > most:
            reason = f"is longer than {most} characters"
            raise InvalidArgument(f"{name}: {reason}", fields={name: reason})


def _app(name: str) -> str:
    return messages.name_from(name, "app") if name else ""


def _version(name: str) -> str:
    return messages.name_from(name, "version") if name else ""


def _revision(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        reason = f"{text[:80]!r} is no revision"
        raise InvalidArgument(f"revision: {reason}", fields={"revision": reason})
    return int(text)


def _app_of(key: str) -> str:
    """Return the app of a key of any kind; empty for the defaults and for unknown keys."""
    try:
        return app_of(key) or ""
    except MalformedConfig:
        return ""
