"""Access rules, worker settings, aliases and shadows, instances, problems and watches, against a real etcd."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from atserving.admin.v1 import admin_pb2
from atserving.config import app_metadata_key, app_routing_key, release_key, worker_keys
from atserving.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound
from registry.admin.service import AdminService
from registry.admin.state import access_key
from tests.registry.admin.conftest import CONTEXT, Operator
from tests.registry.admin.test_releases import delete, demote, promote, two_versions
from tests.waiting import until

MERGED = admin_pb2.MergedWorker


async def update_app(operator: Operator, paths: list[str] | None = None, **fields: Any) -> admin_pb2.App:
    request = admin_pb2.UpdateAppRequest(app=admin_pb2.App(name=operator.app, **fields))
    request.update_mask.paths[:] = paths or []
    return await operator.service.update_app(request, CONTEXT)


async def update_worker(operator: Operator, version: str = "", **fields: Any) -> admin_pb2.Worker:
    request = admin_pb2.UpdateWorkerRequest(worker=admin_pb2.Worker(app=operator.app, version=version))
    worker = request.worker
    for name, value in fields.items():
        if name in ("max_concurrent", "scripts"):
            setattr(worker, name, value)
        elif name.startswith("fetch_"):
            getattr(worker, name).hosts.extend(value)
        else:
            getattr(worker, name).FromMilliseconds(value)
    return await operator.service.update_worker(request, CONTEXT)


async def update_access(operator: Operator, paths: list[str] | None = None, **fields: Any) -> admin_pb2.Access:
    request = admin_pb2.UpdateAccessRequest(access=admin_pb2.Access(app=operator.app, **fields))
    request.update_mask.paths[:] = paths or []
    return await operator.service.update_access(request, CONTEXT)


async def stored(operator: Operator, key: str) -> Any:
    kv = await operator.client.get(key)
    return msgspec.json.decode(kv.value) if kv else None


async def test_aliases_move_one_by_one(operator: Operator) -> None:
    await two_versions(operator)
    app = await update_app(operator, aliases={"stable": "v1", "next": "v2"})
    assert dict(app.aliases) == {"stable": "v1", "next": "v2"}
    move = admin_pb2.SetAliasRequest(app=operator.app, alias="stable", version="v2")
    app = await operator.service.set_alias(move, CONTEXT)
    assert dict(app.aliases) == {"stable": "v2", "next": "v2"}
    remove = admin_pb2.DeleteAliasRequest(app=operator.app, alias="next")
    app = await operator.service.delete_alias(remove, CONTEXT)
    assert dict(app.aliases) == {"stable": "v2"}
    with pytest.raises(NotFound, match="no alias 'next'"):
        await operator.service.delete_alias(remove, CONTEXT)
    release = await operator.service.get_release(
        admin_pb2.GetReleaseRequest(app=operator.app, version="stable"), CONTEXT
    )
    assert (release.version, list(release.aliases)) == ("v2", ["stable"])
    await update_app(operator, ["aliases"])
    assert await stored(operator, app_routing_key(operator.app)) is None
    assert (await operator.history())[0].method == "UpdateApp"


@pytest.mark.parametrize(
    ("field", "aliases"),
    [("aliases.v1", {"v1": "v2"}), ("aliases.stable", {"stable": "v9"}), ("aliases.a/b", {"a/b": "v1"})],
)
async def test_a_wrong_alias_is_named(operator: Operator, field: str, aliases: dict[str, str]) -> None:
    await two_versions(operator)
    with pytest.raises(InvalidArgument) as caught:
        await update_app(operator, aliases=aliases)
    assert list(caught.value.fields) == [field]


async def test_a_version_can_not_take_the_name_of_an_alias(operator: Operator) -> None:
    await operator.publish("v1")
    await update_app(operator, aliases={"stable": "v1"})
    with pytest.raises(InvalidArgument, match="'stable' is an alias"):
        await operator.publish("stable")


async def test_a_promotion_by_alias(operator: Operator) -> None:
    await two_versions(operator)
    await update_app(operator, aliases={"next": "v2"})
    await promote(operator, "next")
    assert (await operator.phases())["v2"] == "production"


async def test_a_shadow_is_a_version_in_staging(operator: Operator) -> None:
    await two_versions(operator)
    app = await update_app(operator, shadow=admin_pb2.Shadow(version="v2", percent=10))
    assert (app.shadow.version, app.shadow.percent) == ("v2", 10)
    with pytest.raises(FailedPrecondition, match="shadow"):
        await promote(operator, "v2")
    await operator.deregister("v2")
    with pytest.raises(FailedPrecondition, match="shadow"):
        await delete(operator, "v2")
    with pytest.raises(InvalidArgument, match="in staging"):
        await update_app(operator, shadow=admin_pb2.Shadow(version="v1", percent=10))
    with pytest.raises(InvalidArgument, match=r"shadow\.percent"):
        await update_app(operator, shadow=admin_pb2.Shadow(version="v2", percent=101))
    assert not (await update_app(operator, ["shadow"])).HasField("shadow")


async def test_the_key_header(operator: Operator) -> None:
    assert (await update_app(operator, key_header="x-user")).key_header == "x-user"
    with pytest.raises(InvalidArgument, match="key_header"):
        await update_app(operator, key_header="no header")
    with pytest.raises(InvalidArgument, match="update_mask"):
        await update_app(operator, ["name"])


async def test_settings_merge_from_three_levels(operator: Operator) -> None:
    await operator.publish("v1")
    await update_worker(operator, timeout=2000, max_concurrent=32)
    await update_worker(operator, "v1", delay4batch=5)
    await update_worker(operator, "v1", scripts="forbid")
    await update_worker(operator, "v1", wait_for_instance=20_000)
    assert await stored(operator, worker_keys(operator.app, "v1")[1]) == {"timeout": "2s", "max_concurrent": 32}
    assert await stored(operator, worker_keys(operator.app, "v1")[0]) == {
        "delay4batch": "5ms",
        "scripts": "forbid",
        "wait_for_instance": "20s",
    }
    request = admin_pb2.GetMergedWorkerRequest(app=operator.app, version="v1")
    merged = await operator.service.get_merged_worker(request, CONTEXT)
    assert {each.name: (each.value_json, each.level) for each in merged.settings} == {
        "timeout": ('"2s"', MERGED.LEVEL_APP),
        "max_concurrent": ("32", MERGED.LEVEL_APP),
        "delay4batch": ('"0.005s"', MERGED.LEVEL_VERSION),
        "wait_for_instance": ('"20s"', MERGED.LEVEL_VERSION),
        "fetch_allow": ('["*"]', MERGED.LEVEL_BUILT_IN),
        "fetch_deny": ("[]", MERGED.LEVEL_BUILT_IN),
        "scripts": ('"forbid"', MERGED.LEVEL_VERSION),
    }
    assert merged.settings[0].key == worker_keys(operator.app, "v1")[1]


async def test_hosts_denied_by_several_levels_are_all_denied(operator: Operator) -> None:
    await operator.publish("v1")
    await update_worker(operator, fetch_allow=["a.example"], fetch_deny=["b.example", "c.example"])
    await update_worker(operator, "v1", fetch_allow=["*"], fetch_deny=["d.example"])
    request = admin_pb2.GetMergedWorkerRequest(app=operator.app, version="v1")
    merged = await operator.service.get_merged_worker(request, CONTEXT)
    shown = {each.name: each.value_json for each in merged.settings}
    assert shown["fetch_allow"] == '["*"]'
    assert shown["fetch_deny"] == '["d.example","b.example","c.example"]'


async def test_a_mask_removes_a_setting(operator: Operator) -> None:
    await update_worker(operator, timeout=2000, max_concurrent=32)
    request = admin_pb2.UpdateWorkerRequest(worker=admin_pb2.Worker(app=operator.app))
    request.update_mask.paths[:] = ["timeout"]
    left = await operator.service.update_worker(request, CONTEXT)
    assert not left.HasField("timeout")
    assert left.max_concurrent == 32
    gone = admin_pb2.DeleteWorkerRequest(app=operator.app)
    await operator.service.delete_worker(gone, CONTEXT)
    with pytest.raises(NotFound):
        await operator.service.delete_worker(gone, CONTEXT)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timeout", 0),
        ("timeout", -5),
        ("max_concurrent", 0),
        ("delay4batch", 10**8),
        ("wait_for_instance", -5),
        ("wait_for_instance", 10**8),
    ],
)
async def test_a_wrong_setting_is_named(operator: Operator, name: str, value: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await update_worker(operator, "", **{name: value})
    assert list(caught.value.fields) == [name]
    with pytest.raises(NotFound):
        await update_worker(operator, "v9", max_concurrent=1)


async def test_access_rules(operator: Operator) -> None:
    users = admin_pb2.Access.Users(uids=[7, 8])
    rules = await update_access(operator, public=False, user_whitelist=users)
    assert await stored(operator, app_metadata_key(operator.app)) == {"public": False, "user_whitelist": [7, 8]}
    with pytest.raises(Aborted):
        await operator.service.delete_access(admin_pb2.DeleteAccessRequest(app=operator.app, etag="1"), CONTEXT)
    rules = await update_access(operator, ["public"], public=True, etag=rules.etag)
    assert list(rules.user_whitelist.uids) == [7, 8]
    await operator.service.delete_access(admin_pb2.DeleteAccessRequest(app=operator.app, etag=rules.etag), CONTEXT)
    assert await stored(operator, app_metadata_key(operator.app)) is None


async def test_malformed_rules_are_shown_and_can_be_replaced(operator: Operator) -> None:
    await operator.etcdctl(app_metadata_key(operator.app), '{"public": fals')
    request = admin_pb2.GetAccessRequest(app=operator.app)
    assert "closed" in (await operator.service.get_access(request, CONTEXT)).malformed
    await update_access(operator, public=True)
    found = await operator.service.get_access(request, CONTEXT)
    assert (found.malformed, found.public) == ("", True)


async def test_the_default_rules(operator: Operator) -> None:
    request = admin_pb2.UpdateAccessRequest(access=admin_pb2.Access(public=True))
    await operator.service.update_access(request, CONTEXT)
    assert await stored(operator, access_key("")) == {"public": True}
    await operator.service.delete_access(admin_pb2.DeleteAccessRequest(), CONTEXT)
    assert await stored(operator, access_key("")) is None


async def test_unknown_fields_are_warned_of(operator: Operator) -> None:
    await operator.etcdctl(worker_keys(operator.app, "v1")[1], '{"max_concurent": 3}')
    found = await operator.service.list_problems(admin_pb2.ListProblemsRequest(app=operator.app), CONTEXT)
    assert "did you mean 'max_concurrent'" in found.problems[0].reason
    worker = await operator.service.get_worker(admin_pb2.GetWorkerRequest(app=operator.app), CONTEXT)
    assert "max_concurent" in worker.warnings[0]


async def test_config_without_effect_is_warned_of(operator: Operator) -> None:
    of_version, of_app, _ = worker_keys(operator.app, "v9")
    for key in (of_version, of_app):
        await operator.etcdctl(key, '{"max_concurrent": 3}')

    async def reasons() -> dict[str, str]:
        found = await operator.service.list_problems(admin_pb2.ListProblemsRequest(app=operator.app), CONTEXT)
        kind = admin_pb2.ListProblemsResponse.KIND_INEFFECTIVE
        return {each.key: each.reason for each in found.problems if each.kind == kind}

    assert await reasons() == dict.fromkeys((of_version, of_app), "the app has no release")
    await operator.publish("v1", phase=admin_pb2.PHASE_PRODUCTION)
    routing, rules = app_routing_key(operator.app), app_metadata_key(operator.app)
    shadow = '{"aliases": {"next": "v2", "v1": "v1"}, "shadow": {"version": "v1", "percent": 5}}'
    await operator.etcdctl(routing, shadow)
    await operator.etcdctl(rules, '{"public": true, "batch_size": 4}')
    assert await reasons() == {
        of_version: "the app has no version 'v9'",
        routing: "aliases.next: the app has no version 'v2'; aliases.v1: a version has this name; "
        "shadow: version 'v1' is in production",
        rules: "batch_size: no service reads it; a release has one",
    }
    worker = await operator.service.get_worker(admin_pb2.GetWorkerRequest(app=operator.app, version="v9"), CONTEXT)
    assert list(worker.warnings) == ["the app has no version 'v9'"]
    # A write says it at once.
    update = admin_pb2.UpdateWorkerRequest(worker=admin_pb2.Worker(app=f"{operator.app}-none", max_concurrent=3))
    assert list((await operator.service.update_worker(update, CONTEXT)).warnings) == ["the app has no release"]


async def test_instances_are_listed_in_pages(operator: Operator) -> None:
    await operator.publish("v1")
    for number in range(5):
        await operator.register("v1", f"i{number}")
    await operator.etcdctl(release_key(operator.app, "v1"), '{"file": "file:///changed.tar"}')
    seen = []
    token = ""
    while True:
        request = admin_pb2.ListInstancesRequest(app=operator.app, page_size=2, page_token=token)
        page = await operator.service.list_instances(request, CONTEXT)
        seen += [(each.id, each.outdated) for each in page.instances]
        if not (token := page.next_page_token):
            break
    assert seen == [(f"i{number}", True) for number in range(5)]


async def test_apps_and_releases_are_listed_in_pages(operator: Operator) -> None:
    for number in range(5):
        await operator.publish(f"v{number}", desc="odd" if number % 2 else "even")
    request = admin_pb2.ListReleasesRequest(app=operator.app, page_size=3)
    first = await operator.service.list_releases(request, CONTEXT)
    request.page_token = first.next_page_token
    second = await operator.service.list_releases(request, CONTEXT)
    assert [each.version for page in (first, second) for each in page.releases] == [f"v{n}" for n in range(5)]
    assert not second.next_page_token
    odd = admin_pb2.ListReleasesRequest(app=operator.app, filter="odd")
    assert [each.version for each in (await operator.service.list_releases(odd, CONTEXT)).releases] == ["v1", "v3"]
    apps = await operator.service.list_apps(admin_pb2.ListAppsRequest(filter=operator.app), CONTEXT)
    assert [each.name for each in apps.apps if each.name == operator.app] == [operator.app]
    with pytest.raises(InvalidArgument, match="app"):
        await operator.service.list_releases(admin_pb2.ListReleasesRequest(app="a/b"), CONTEXT)


async def test_a_watch_tells_of_each_object_once(operator: Operator) -> None:
    await two_versions(operator)
    seen: list[admin_pb2.WatchAppResponse] = []
    synced = asyncio.Event()

    async def watch(service: AdminService) -> None:
        async for response in service.watch_app(admin_pb2.WatchAppRequest(app=operator.app), CONTEXT):
            seen.append(response)
            if response.synced:
                synced.set()

    watching = asyncio.create_task(watch(operator.service))
    async with asyncio.timeout(10):
        await synced.wait()
    assert [each.WhichOneof("object") for each in seen] == ["app", "release", "release", "instance", "instance", None]
    seen.clear()
    await promote(operator, "v2")
    await demote(operator, "v1")
    await operator.deregister("v1")
    await delete(operator, "v1")
    await until(lambda: any(each.deleted and each.HasField("release") for each in seen))
    watching.cancel()
    told = [
        (each.WhichOneof("object"), each.release.version or each.instance.version, each.deleted)
        for each in seen
        if not each.HasField("app")
    ]
    assert told == [
        ("release", "v2", False),
        ("release", "v1", False),
        ("release", "v1", False),
        ("instance", "v1", True),
        ("release", "v1", True),
    ]


async def test_a_watch_tells_of_values_that_are_not_served(operator: Operator) -> None:
    await operator.publish("v1")
    found: asyncio.Queue[admin_pb2.WatchAppResponse] = asyncio.Queue()

    async def watch() -> None:
        async for response in operator.service.watch_app(admin_pb2.WatchAppRequest(app=operator.app), CONTEXT):
            found.put_nowait(response)

    watching = asyncio.create_task(watch())
    key = release_key(operator.app, "v1")
    stored = await operator.client.get(key)
    assert stored
    async with asyncio.timeout(10):
        while not (await found.get()).synced:
            pass
        await operator.etcdctl(key, "{")
        while "malformed" not in str((told := await found.get()).release.warnings):
            pass
        await operator.etcdctl(key, stored.value.decode())
        while told.release.warnings:
            told = await found.get()
        etag = told.release.etag
        await operator.etcdctl(key, stored.value.decode())
        while told.release.etag == etag:
            told = await found.get()
    watching.cancel()
