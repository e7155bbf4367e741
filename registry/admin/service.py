"""The API of operators: it reads from the mirror, and writes to etcd."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

from google.protobuf.duration_pb2 import Duration

from atserving.admin.v1 import admin_pb2
from atserving.config import MalformedConfig, Release, validate
from atserving.errors import Aborted, InvalidArgument, NotFound
from atserving.tls import Tls
from registry.admin import edits, messages, whole
from registry.admin.history import History
from registry.admin.operators import OperatorStore
from registry.admin.reads import Context, Reads
from registry.admin.state import AppState, access_key, worker_key
from registry.admin.writes import ACCEPT_S, Intent, Writer
from registry.comparisons import Comparisons
from registry.mirror import Mirror

_APP_MASK = ("aliases", "key_header", "shadow")
_RELEASE_MASK = ("phase", "desc", "weight", "signature")
_LIMITS = ("max_requests_per_second", "max_in_flight", "max_bytes_per_minute")
_ACCESS_MASK = ("public", "owner", "user_whitelist", "group_whitelist", *_LIMITS)
_WORKER_MASK = ("timeout", "max_concurrent", "delay4batch", "fetch_allow", "fetch_deny", "scripts")


class _Write(Protocol):
    """The fields that all requests for a change have."""

    validate_only: bool
    force: bool
    message: str
    actor: str


class AdminService(Reads):
    """The methods of the API, one for each rpc. They raise ServingErrors, and EtcdErrors."""

    def __init__(
        self,
        mirror: Mirror,
        writer: Writer,
        history: History,
        comparisons: Comparisons,
        operators: OperatorStore,
        tls: Tls | None = None,
    ) -> None:
        super().__init__(mirror, history, comparisons, operators.known, writer.signatures, tls)
        self._writer = writer
        self._store = operators

    async def update_app(self, request: admin_pb2.UpdateAppRequest, context: Context) -> admin_pb2.App:
        app = request.app
        name = messages.name_from(app.name, "app.name")
        fields: dict[str, Any] = {}
        if app.aliases:
            fields["aliases"] = dict(app.aliases)
        if app.key_header:
            fields["key_header"] = app.key_header
        if app.HasField("shadow"):
            given = {field.name: value for field, value in app.shadow.ListFields()}
            fields["shadow"] = {"percent": app.shadow.percent, **given}
        wanted = messages.wanted(fields, request.update_mask.paths, _APP_MASK)
        changes = {path: fields.get(path) for path in wanted}
        intent = _intent(context, "UpdateApp", request, app.etag)
        state = await self._writer.write(name, intent, lambda state: edits.route(state, changes, force=request.force))
        return messages.app_to(state)

    async def set_alias(self, request: admin_pb2.SetAliasRequest, context: Context) -> admin_pb2.App:
        app = messages.name_from(request.app, "app")
        alias = messages.name_from(request.alias, "alias")
        version = messages.name_from(request.version, "version")
        state = await self._writer.write(
            app,
            _intent(context, "SetAlias", request, request.etag),
            lambda state: edits.set_alias(state, alias, version, force=request.force),
        )
        return messages.app_to(state)

    async def delete_alias(self, request: admin_pb2.DeleteAliasRequest, context: Context) -> admin_pb2.App:
        app = messages.name_from(request.app, "app")
        state = await self._writer.write(
            app,
            _intent(context, "DeleteAlias", request, request.etag),
            lambda state: edits.delete_alias(state, request.alias),
        )
        return messages.app_to(state)

    async def delete_app(self, request: admin_pb2.DeleteAppRequest, context: Context) -> admin_pb2.DeleteAppResponse:
        app = messages.name_from(request.app, "app")
        await self._writer.write(app, _intent(context, "DeleteApp", request, request.etag), edits.delete_app)
        return admin_pb2.DeleteAppResponse()

    async def apply_config(
        self, request: admin_pb2.ApplyConfigRequest, context: Context
    ) -> admin_pb2.ApplyConfigResponse:
        app = messages.app_from(request.app)
        wanted = dict(request.values)
        found: list[admin_pb2.KeyChange] = []
        etag = ""

        def edit(state: AppState) -> edits.Edits:
            nonlocal etag
            made = whole.apply(state, wanted, prune=request.prune)
            found[:] = whole.changes(state, made)
            etag = state.etag
            return made

        after = await self._writer.write(app, _intent(context, "ApplyConfig", request, request.etag), edit)
        warnings = [f"{key}: {reason}" for key, reason in sorted(after.warnings.items())]
        etag = etag if request.validate_only else after.etag
        return admin_pb2.ApplyConfigResponse(etag=etag, changes=found, warnings=warnings)

    async def split_app(self, request: admin_pb2.SplitAppRequest, context: Context) -> admin_pb2.App:
        app = messages.name_from(request.app, "app")
        weights = dict(request.weights)
        if request.by_capacity and (weights or request.exclusive):
            reason = "goes without weights, and is not exclusive"
            raise InvalidArgument(f"by_capacity: {reason}", fields={"by_capacity": reason})

        def edit(state: AppState) -> edits.Edits:
            if request.by_capacity:
                return edits.split_by_capacity(state)
            return edits.split(state, weights, exclusive=request.exclusive)

        return messages.app_to(await self._writer.write(app, _intent(context, "SplitApp", request, request.etag), edit))

    async def rollback_app(self, request: admin_pb2.RollbackAppRequest, context: Context) -> admin_pb2.App:
        app = messages.app_from(request.app)
        whose = f"app {app!r}" if app else "the default"
        etag = await self._writer.etag(app)
        await self._writer.until_recorded()
        if request.revision:
            revision = messages.revision_from(request.revision)
        else:
            last = await self._history.newest(app, 1)
            if not last:
                raise NotFound(f"{whose} has no history")
            revision = last[0].revision
        undone = await self._history.since(app, revision)
        if not undone or undone[-1].revision != revision:
            raise NotFound(f"{whose} has no change {revision} in its history")

        def edit(state: AppState) -> edits.Edits:
            if state.etag != etag:
                raise Aborted("it changed at the same time: look at its history, and try again")
            return edits.roll_back(state, undone)

        return messages.app_to(
            await self._writer.write(app, _intent(context, "RollbackApp", request, request.etag), edit)
        )

    async def create_release(self, request: admin_pb2.CreateReleaseRequest, context: Context) -> admin_pb2.Release:
        release, given = _release(request.release)
        state = await self._writer.write(
            release.name,
            _intent(context, "CreateRelease", request, request.release.etag),
            lambda state: edits.put_release(state, release, given),
            lambda state: state.etag_of(release.key),
        )
        return messages.release_to(state, state.releases[release.version])

    async def update_release(self, request: admin_pb2.UpdateReleaseRequest, context: Context) -> admin_pb2.Release:
        message = request.release
        paths = list(request.update_mask.paths)
        given = messages.release_fields(message)
        if not message.file:
            del given["file"]
        fixed = set(Release.__struct_fields__) - {*_RELEASE_MASK, "name", "version"}
        if wrong := [name for name in paths or given if name in fixed]:
            raise InvalidArgument(
                f"{', '.join(wrong)}: the content of a release never changes: publish a new version",
                fields=dict.fromkeys(wrong, "never changes"),
            )
        given = {name: value for name, value in given.items() if name in _RELEASE_MASK}
        changes = {name: given.get(name) for name in messages.wanted(given, paths, _RELEASE_MASK)}
        return await self._change_release(
            context,
            "UpdateRelease",
            message.app,
            message.version,
            request,
            message.etag,
            lambda state: edits.amend_release(state, message.version, changes),
        )

    async def promote_release(self, request: admin_pb2.PromoteReleaseRequest, context: Context) -> admin_pb2.Release:
        return await self._change_release(
            context,
            "PromoteRelease",
            request.app,
            request.version,
            request,
            request.etag,
            lambda state: edits.promote(state, request.version, exclusive=request.exclusive),
        )

    async def demote_release(self, request: admin_pb2.DemoteReleaseRequest, context: Context) -> admin_pb2.Release:
        return await self._change_release(
            context,
            "DemoteRelease",
            request.app,
            request.version,
            request,
            request.etag,
            lambda state: edits.demote(state, request.version),
        )

    async def _change_release(
        self,
        context: Context,
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
            _intent(context, method, request, etag),
            edit,
            lambda state: state.etag_of(edits.release_of(state, name).key),
        )
        return messages.release_to(state, edits.release_of(state, name))

    async def delete_release(
        self, request: admin_pb2.DeleteReleaseRequest, context: Context
    ) -> admin_pb2.DeleteReleaseResponse:
        app = messages.name_from(request.app, "app")
        version = messages.name_from(request.version, "version")
        await self._writer.write(
            app,
            _intent(context, "DeleteRelease", request, request.etag),
            lambda state: edits.delete_release(state, version, force=request.force),
            lambda state: state.etag_of(edits.release_of(state, version).key),
        )
        return admin_pb2.DeleteReleaseResponse()

    async def update_access(self, request: admin_pb2.UpdateAccessRequest, context: Context) -> admin_pb2.Access:
        fields = messages.access_fields(request.access)
        paths = list(request.update_mask.paths)
        app = messages.app_from(request.access.app)
        state = await self._writer.write(
            app,
            _intent(context, "UpdateAccess", request, request.access.etag),
            lambda state: edits.put_access(
                state,
                messages.masked(
                    fields, paths, _ACCESS_MASK, edits.current_access(state), state.malformed.get(access_key(app))
                ),
            ),
            lambda state: state.etag_of(access_key(app)),
        )
        return messages.access_to(state)

    async def delete_access(
        self, request: admin_pb2.DeleteAccessRequest, context: Context
    ) -> admin_pb2.DeleteAccessResponse:
        await self._delete(
            context, "DeleteAccess", messages.app_from(request.app), "access rules", access_key, request, request.etag
        )
        return admin_pb2.DeleteAccessResponse()

    async def update_worker(self, request: admin_pb2.UpdateWorkerRequest, context: Context) -> admin_pb2.Worker:
        message = request.worker
        app, version = messages.app_from(message.app), messages.version_from(message.version)
        fields = messages.worker_fields(message)
        paths = list(request.update_mask.paths)
        state = await self._writer.write(
            app,
            _intent(context, "UpdateWorker", request, message.etag),
            lambda state: edits.put_worker(
                state,
                version,
                messages.masked(
                    fields,
                    paths,
                    _WORKER_MASK,
                    edits.current_worker(state, version),
                    state.malformed.get(worker_key(app, version)),
                ),
            ),
            lambda state: state.etag_of(worker_key(app, version)),
        )
        return messages.worker_to(state, version)

    async def delete_worker(
        self, request: admin_pb2.DeleteWorkerRequest, context: Context
    ) -> admin_pb2.DeleteWorkerResponse:
        version = messages.version_from(request.version)
        await self._delete(
            context,
            "DeleteWorker",
            messages.app_from(request.app),
            "worker settings",
            lambda app: worker_key(app, version),
            request,
            request.etag,
        )
        return admin_pb2.DeleteWorkerResponse()

    async def _delete(
        self,
        context: Context,
        method: str,
        app: str,
        what: str,
        key_of: Callable[[str], str],
        request: _Write,
        etag: str,
    ) -> None:
        key = key_of(app)
        await self._writer.write(
            app,
            _intent(context, method, request, etag),
            lambda state: edits.delete_key(state, key, what),
            lambda state: state.etag_of(key),
        )

    async def list_operators(
        self, request: admin_pb2.ListOperatorsRequest, _: Context
    ) -> admin_pb2.ListOperatorsResponse:
        return self._store.list(request)

    async def put_operator(self, request: admin_pb2.PutOperatorRequest, context: Context) -> admin_pb2.Operator:
        return await self._store.put(request.operator, _intent(context, "PutOperator", request, request.operator.etag))

    async def delete_operator(
        self, request: admin_pb2.DeleteOperatorRequest, context: Context
    ) -> admin_pb2.DeleteOperatorResponse:
        await self._store.delete(request.name, _intent(context, "DeleteOperator", request, request.etag))
        return admin_pb2.DeleteOperatorResponse()

    async def accept_deletions(
        self, request: admin_pb2.AcceptDeletionsRequest, context: Context
    ) -> admin_pb2.AcceptDeletionsResponse:
        if not request.validate_only:
            await self._writer.accept_deletions(_intent(context, "AcceptDeletions", request, ""))
        return admin_pb2.AcceptDeletionsResponse(ttl=Duration(seconds=ACCEPT_S))


def _release(message: admin_pb2.Release) -> tuple[Release, Collection[str]]:
    """Return the release to publish, and the fields that the message sets. Raises InvalidArgument."""
    messages.name_from(message.app, "app")
    messages.name_from(message.version, "version")
    fields = messages.release_fields(message)
    try:
        return validate(Release, fields), fields.keys()
    except MalformedConfig as error:
        field, _, reason = str(error).partition(": ")
        raise InvalidArgument(str(error), fields={field: reason}) from None


def _intent(context: Context, method: str, request: _Write, etag: str) -> Intent:
    _check_texts(request)
    # A proven name counts more than what the client says.
    actor, proven = context.caller or request.actor, bool(context.caller)
    return Intent(method, etag, request.validate_only, request.force, request.message, actor, proven, context.notes)


def _check_texts(request: _Write) -> None:
    for name, most in (("message", 1000), ("actor", 200)):
        if len(getattr(request, name)) > most:
            reason = f"is longer than {most} characters"
            raise InvalidArgument(f"{name}: {reason}", fields={name: reason})
