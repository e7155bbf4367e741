"""Changes of two operators at the same time: none is lost, and none leaves what another one took away."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from atserving.admin.v1 import admin_pb2
from atserving.config import app_routing_key, worker_keys
from atserving.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound
from registry.admin.state import ABSENT, AppState
from registry.admin.writes import Intent
from registry.operators import Operators
from tests.registry.admin.conftest import CONTEXT, Operator
from tests.registry.admin.test_history import roll_back
from tests.registry.admin.test_releases import delete, two_versions
from tests.registry.admin.test_settings import update_worker


async def describe(operator: Operator, text: str) -> None:
    release = admin_pb2.Release(app=operator.app, version="v1", desc=text)
    request = admin_pb2.UpdateReleaseRequest(release=release, update_mask=FieldMask(paths=["desc"]))
    await operator.service.update_release(request, CONTEXT)


async def described(operator: Operator) -> str:
    request = admin_pb2.GetReleaseRequest(app=operator.app, version="v1")
    return (await operator.service.get_release(request, CONTEXT)).desc


async def apply(operator: Operator, values: dict[str, str], **fields: Any) -> admin_pb2.ApplyConfigResponse:
    request = admin_pb2.ApplyConfigRequest(app=operator.app, values=values, **fields)
    return await operator.service.apply_config(request, CONTEXT)


def between(operator: Operator, monkeypatch: pytest.MonkeyPatch, change: Callable[[], Awaitable[object]]) -> None:
    """Let a change happen once, after the next write has read the state and before its transaction."""
    interrupt(operator.service._writer, monkeypatch, change)


def interrupt(writer: Any, monkeypatch: pytest.MonkeyPatch, change: Callable[[], Awaitable[object]]) -> None:
    commit = writer._commit

    async def commit_later(*arguments: Any) -> int | None:
        monkeypatch.setattr(writer, "_commit", commit)
        await change()
        written: int | None = await commit(*arguments)
        return written

    monkeypatch.setattr(writer, "_commit", commit_later)


async def test_a_rollback_takes_nothing_back_that_it_has_not_read(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    await operator.publish("v1", desc="first")
    await describe(operator, "second")
    between(operator, monkeypatch, lambda: describe(operator, "third"))
    with pytest.raises(Aborted, match="at the same time"):
        await roll_back(operator)
    assert await described(operator) == "third"
    await roll_back(operator)
    assert await described(operator) == "second"


async def test_a_rollback_takes_nothing_back_that_came_after_its_history(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    await operator.publish("v1", desc="first")
    await describe(operator, "second")
    since = operator.service._history.since

    async def later(app: str, revision: int) -> Any:
        found = await since(app, revision)
        await describe(operator, "third")
        return found

    monkeypatch.setattr(operator.service._history, "since", later)
    with pytest.raises(Aborted, match="at the same time"):
        await roll_back(operator)
    assert await described(operator) == "third"


@pytest.mark.parametrize("what", ["alias", "shadow", "worker"])
async def test_what_names_a_version_does_not_outlive_it(
    operator: Operator, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    await operator.publish("v1", phase=admin_pb2.PHASE_PRODUCTION)
    await operator.publish("v9")
    between(operator, monkeypatch, lambda: delete(operator, "v9"))
    if what == "worker":
        with pytest.raises(NotFound, match="no version 'v9'"):
            await update_worker(operator, "v9", max_concurrent=3)
    elif what == "alias":
        with pytest.raises(InvalidArgument, match="no version 'v9'"):
            await operator.service.set_alias(
                admin_pb2.SetAliasRequest(app=operator.app, alias="best", version="v9"), CONTEXT
            )
    else:
        app = admin_pb2.App(name=operator.app, shadow=admin_pb2.Shadow(version="v9", percent=5))
        with pytest.raises(InvalidArgument, match="no version 'v9'"):
            await operator.service.update_app(admin_pb2.UpdateAppRequest(app=app), CONTEXT)


async def test_the_etag_of_an_app_that_is_not_there_keeps_it_away(operator: Operator) -> None:
    """Between a diff of the config and its application, a colleague publishes the app's first version."""
    key = worker_keys(operator.app, "")[1]
    shown = await apply(operator, {key: "{}"}, prune=True, validate_only=True)
    assert shown.etag == ABSENT == AppState(operator.app, {}).etag
    await operator.publish("v1")
    with pytest.raises(Aborted, match="it exists"):
        await apply(operator, {key: "{}"}, prune=True, etag=shown.etag)
    assert list(await operator.phases()) == ["v1"]
    with pytest.raises(Aborted, match="it is gone"):
        await operator.service.delete_worker(admin_pb2.DeleteWorkerRequest(app=operator.app, etag="7"), CONTEXT)


@pytest.mark.parametrize(
    ("routing", "reason"),
    [
        ('{"aliases": {"best": "v77"}}', "no version 'v77'"),
        ('{"aliases": {"best": "v2"}}', "no instance of .*/v2 is ready, and callers use the alias 'best'"),
        ('{"aliases": {"v2": "v1"}}', "'v2' is a version of the app"),
        ('{"shadow": {"version": "v1", "percent": 5}}', "no version in staging"),
    ],
)
async def test_an_applied_alias_or_shadow_is_refused_as_elsewhere(
    operator: Operator, routing: str, reason: str
) -> None:
    await two_versions(operator)
    await operator.deregister("v2")
    await apply(operator, {app_routing_key(operator.app): '{"aliases": {"best": "v1"}}'})
    for validate_only in (True, False):
        with pytest.raises(FailedPrecondition, match=reason):
            await apply(operator, {app_routing_key(operator.app): routing}, validate_only=validate_only)
    await apply(operator, {app_routing_key(operator.app): routing}, force=True)


async def test_an_alias_of_callers_does_not_move_to_a_version_without_instances(operator: Operator) -> None:
    await two_versions(operator)
    move = admin_pb2.SetAliasRequest(app=operator.app, alias="best", version="v1")
    await operator.service.set_alias(move, CONTEXT)
    await operator.deregister("v2")
    move.version = "v2"
    with pytest.raises(FailedPrecondition, match="callers use the alias"):
        await operator.service.set_alias(move, CONTEXT)
    move.alias = "next"
    app = await operator.service.set_alias(move, CONTEXT)
    assert app.warnings == [f"{app_routing_key(operator.app)}: aliases.next: no instance of 'v2' is ready"]


async def test_of_two_admins_who_remove_each_other_one_is_left(
    operator: Operator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "operators.json").write_text("{}")
    store = operator.service._store
    store.known = Operators(tmp_path / "operators.json")
    for name in ("one", "two"):
        admin = admin_pb2.Operator(name=name, role=admin_pb2.ROLE_ADMIN, certificate=f"spiffe://mesh/{name}")
        await store.put(admin, Intent("PutOperator"))
    interrupt(store, monkeypatch, lambda: store.delete("two", Intent("DeleteOperator")))
    with pytest.raises(FailedPrecondition, match="'one' is the last admin"):
        await store.delete("one", Intent("DeleteOperator"))
    await store.put(admin, Intent("PutOperator"))
    viewer = admin_pb2.Operator(name="three", certificate="spiffe://mesh/three")
    interrupt(store, monkeypatch, lambda: store.put(viewer, Intent("PutOperator")))
    await store.delete("one", Intent("DeleteOperator"))
    with pytest.raises(FailedPrecondition, match="'two' is the last admin"):
        await store.put(admin_pb2.Operator(name="two"), Intent("PutOperator"))
