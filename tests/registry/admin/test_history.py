"""The history of the config, and the way back, against a real etcd."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from google.protobuf.duration_pb2 import Duration

from atserving.admin.v1 import admin_pb2
from atserving.config import HISTORY, app_metadata_key, release_key
from atserving.errors import FailedPrecondition, InvalidArgument, NotFound
from registry.admin.history import History, KeyChange
from registry.etcd import Connection, EtcdClient
from registry.etcd.errors import OutOfSpace
from tests.processes import Etcd, cluster
from tests.registry.admin.conftest import CONTEXT, Operator, operating
from tests.registry.admin.test_releases import PRODUCTION, app_of, delete, promote, split, two_versions
from tests.waiting import until_async

KINDS = admin_pb2.Change


async def roll_back(operator: Operator, **fields: Any) -> admin_pb2.App:
    return await operator.service.rollback_app(admin_pb2.RollbackAppRequest(app=operator.app, **fields), CONTEXT)


async def test_a_change_says_who_when_what_and_why(operator: Operator) -> None:
    began_s = time.time()
    await operator.publish("v1", phase=PRODUCTION)
    await operator.register("v1")
    await operator.publish("v2")
    await operator.register("v2")
    await promote(operator, "v2", exclusive=True, actor="ada@host", message="better on faces")
    change = (await operator.history())[0]
    assert (change.actor, change.actor_kind) == ("ada@host", KINDS.ACTOR_KIND_CLIENT)
    assert (change.method, change.message, change.app) == ("PromoteRelease", "better on faces", operator.app)
    assert began_s - 1 < change.time.ToMilliseconds() / 1000 < time.time() + 1
    assert [each.key for each in change.keys] == [release_key(operator.app, "v1"), release_key(operator.app, "v2")]
    assert '"phase":"production"' in change.keys[0].before
    assert '"phase":"staging"' in change.keys[0].after


async def test_changes_by_other_tools_are_in_it(operator: Operator) -> None:
    key = app_metadata_key(operator.app)
    await operator.etcdctl(key, '{"public": true}')
    await operator.etcdctl(key, None)
    gone, put = await operator.history()
    assert gone.actor_kind == put.actor_kind == KINDS.ACTOR_KIND_ETCD
    assert (gone.keys[0].before, gone.keys[0].HasField("after")) == ('{"public": true}', False)
    assert (put.keys[0].HasField("before"), put.keys[0].after) == (False, '{"public": true}')


async def test_the_defaults_have_a_history_and_a_way_back(operator: Operator) -> None:
    for seconds in (1, 2):
        message = admin_pb2.Worker(timeout=Duration(seconds=seconds))
        await operator.service.update_worker(admin_pb2.UpdateWorkerRequest(worker=message), CONTEXT)
    await operator.service.accept_deletions(
        admin_pb2.AcceptDeletionsRequest(actor="ada@host", message="restored"), CONTEXT
    )
    changes = (await operator.service.list_history(admin_pb2.ListHistoryRequest(), CONTEXT)).changes
    assert [each.method for each in changes[:3]] == ["AcceptDeletions", "UpdateWorker", "UpdateWorker"]
    assert (changes[0].actor, changes[0].message) == ("ada@host", "restored")
    request = admin_pb2.RollbackAppRequest(revision=changes[1].revision)
    await operator.service.rollback_app(request, CONTEXT)
    defaults = await operator.service.get_worker(admin_pb2.GetWorkerRequest(), CONTEXT)
    assert defaults.timeout.seconds == 1
    await operator.service.delete_worker(admin_pb2.DeleteWorkerRequest(), CONTEXT)


async def is_full(client: EtcdClient) -> bool:
    try:
        await client.put("other/small", "x")
    except OutOfSpace:
        return True
    return False


async def test_it_misses_nothing_of_the_time_when_etcd_was_full(tmp_path: Path) -> None:
    (etcd,) = cluster(tmp_path, ["full"], "--quota-backend-bytes", str(8 << 20))
    etcd.start()
    try:
        await etcd.ready()
        async with operating(etcd, "full") as operator:
            await operator.publish("v1", desc="first")
            with suppress(OutOfSpace):
                for _ in range(20):
                    await operator.client.put("other/filler", "x" * (1 << 20))
            await until_async(lambda: is_full(operator.client), what="etcd refuses small values, too")
            deleted = await operator.client.delete(release_key("full", "v1"))
            # So long its entry is refused.
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await operator.recorder.reached(deleted)
            freed = await operator.client.delete("other/filler")
            for command in (["compact", str(freed)], ["defrag"], ["alarm", "disarm"]):
                await asyncio.to_thread(etcd.ctl, *command)
            async with asyncio.timeout(20):
                await operator.recorder.reached(deleted)
            gone, put = await operator.history()
            assert (gone.revision, put.method) == (str(deleted), "CreateRelease")
            assert gone.keys[0].before == put.keys[0].after
    finally:
        etcd.kill()


async def test_a_rollback_to_a_malformed_value_names_its_key(operator: Operator) -> None:
    key = app_metadata_key(operator.app)
    await operator.etcdctl(key, "{oops")
    await operator.etcdctl(key, '{"public": true}')
    with pytest.raises(InvalidArgument, match=f"^{key}: not JSON: ") as wrong:
        await roll_back(operator)
    assert not wrong.value.fields


async def test_instances_are_not_in_it(operator: Operator) -> None:
    await operator.publish("v1")
    await operator.register("v1")
    await operator.deregister("v1")
    assert [each.method for each in await operator.history()] == ["CreateRelease"]


async def test_what_is_missed_by_all_registries_is_recorded_later(etcd: Etcd) -> None:
    key = app_metadata_key("app")
    async with operating(etcd, "app") as operator:
        await operator.etcdctl(key, '{"public": true}')
        assert len(await operator.history()) == 1
    async with EtcdClient(Connection([etcd.address])) as client:
        await client.put(key, '{"public": false}')
        await client.delete(key)
    async with operating(etcd, "app") as operator:
        revision = await operator.client.put("/ava/serving/app/metadata/end", "{}")
        await operator.recorder.reached(revision)
        history = await operator.history()
        assert [(each.keys[0].before, each.keys[0].after) for each in history] == [
            ('{"public": false}', ""),
            ('{"public": true}', '{"public": false}'),
            ("", '{"public": true}'),
        ]


async def test_two_recorders_write_one_entry(operator: Operator, shared_etcd: Etcd) -> None:
    async with operating(shared_etcd, operator.app) as other:
        for number in range(20):
            await operator.publish(f"v{number}")
        revision = await other.client.put(app_metadata_key(operator.app), "{}")
        await asyncio.gather(operator.recorder.reached(revision), other.recorder.reached(revision))
        history = await operator.history()
        assert await other.history() == history
        assert len(history) == 21
        assert len({each.revision for each in history}) == 21


async def test_the_history_is_bounded(etcd: Etcd) -> None:
    async with operating(etcd, "app", most=5) as operator:
        for number in range(12):
            await operator.publish(f"v{number}")
        history = await operator.history()
        assert [each.keys[0].key[-3:].strip("/") for each in history] == ["v11", "v10", "v9", "v8", "v7"]


async def test_pages_go_back_in_time(operator: Operator) -> None:
    for number in range(7):
        await operator.publish(f"v{number}")
    seen: list[str] = []
    token = ""
    while True:
        request = admin_pb2.ListHistoryRequest(app=operator.app, page_size=3, page_token=token)
        page = await operator.service.list_history(request, CONTEXT)
        seen += [each.keys[0].key[-2:] for each in page.changes]
        if not (token := page.next_page_token):
            break
    assert seen == [f"v{number}" for number in reversed(range(7))]
    with pytest.raises(InvalidArgument, match="page_token"):
        await operator.service.list_history(admin_pb2.ListHistoryRequest(app=operator.app, page_token="?"), CONTEXT)


async def test_large_pages_end_early(operator: Operator) -> None:
    key = release_key(operator.app, "v1")
    for number in range(10):
        await operator.etcdctl(key, '{"file": "file:///m.tar", "desc": "%s"}' % (str(number) * 240_000))
    seen: list[str] = []
    token = "first"
    while token:
        request = admin_pb2.ListHistoryRequest(app=operator.app, page_token="" if token == "first" else token)
        page = await operator.service.list_history(request, CONTEXT)
        assert page.ByteSize() < 4 << 20, "a client of gRPC takes no more unless it is told to"
        seen += [each.keys[0].after[-3] for each in page.changes]
        token = page.next_page_token
    assert seen == [str(number) for number in reversed(range(10))]


async def test_a_copied_history_hides_no_change(etcd: Etcd) -> None:
    key = app_metadata_key("app")
    async with operating(etcd, "app") as operator:
        await operator.etcdctl(key, '{"public": true}')
        await operator.service.list_history(admin_pb2.ListHistoryRequest(app="app"), CONTEXT)
        # As if this etcd had been filled from another one, whose next changes had the same numbers.
        (copied,) = await History(operator.client).newest("app", 1)
        next_ = (await operator.client.put("/ava/serving/worker/default", "{}")) + 3
        other = msgspec.structs.replace(copied, revision=next_, keys=(KeyChange(key, "1", "2"),))
        for revision in range(next_, next_ + 3):
            value = msgspec.json.encode(msgspec.structs.replace(other, revision=revision))
            await operator.client.put(f"{HISTORY}app/{revision:020d}", value)
        while (revision := await operator.client.put(key, '{"public": false}')) < next_:
            pass
        async with asyncio.timeout(10):
            await operator.recorder.reached(revision)
        change = next(each for each in await operator.history() if each.keys[0].after == '{"public": false}')
        await roll_back(operator, revision=change.revision)
        kv = await operator.client.get(key)
        assert kv
        assert kv.value == b'{"public": true}'


async def test_the_history_of_all_apps(operator: Operator) -> None:
    await operator.publish("v1")
    await operator.etcdctl("/ava/serving/worker/default", '{"max_concurrent": 65}')
    await operator.etcdctl("/ava/serving/worker/default", None)
    found = await operator.service.list_history(admin_pb2.ListHistoryRequest(app="-", page_size=3), CONTEXT)
    assert [each.app for each in found.changes] == ["", "", operator.app]


async def test_the_last_change_is_undone(operator: Operator) -> None:
    await two_versions(operator)
    await promote(operator, "v2", exclusive=True)
    await roll_back(operator)
    assert await operator.phases() == {"v1": "production", "v2": "staging"}
    # To undo that is to promote again.
    await roll_back(operator)
    assert await operator.phases() == {"v1": "staging", "v2": "production"}
    assert (await operator.history())[0].method == "RollbackApp"


async def test_an_app_goes_back_to_before_a_named_change(operator: Operator) -> None:
    await two_versions(operator)
    app = await app_of(operator)
    await split(operator, {"v1": 9, "v2": 1})
    change = (await operator.history())[0]
    await split(operator, {"v1": 5, "v2": 5})
    await operator.etcdctl(app_metadata_key(operator.app), '{"public": true}')
    await promote(operator, "v2", exclusive=True)
    await roll_back(operator, revision=change.revision)
    back = await app_of(operator)
    assert list(back.shares) == list(app.shares)
    assert await operator.client.get(app_metadata_key(operator.app)) is None
    with pytest.raises(NotFound, match="no change 1 "):
        await roll_back(operator, revision="1")
    with pytest.raises(InvalidArgument, match="no revision"):
        await roll_back(operator, revision="last")


async def test_a_deleted_release_comes_back(operator: Operator) -> None:
    await operator.publish("v1", weight=0.25)
    before = await operator.client.get(release_key(operator.app, "v1"))
    await delete(operator, "v1")
    await roll_back(operator)
    after = await operator.client.get(release_key(operator.app, "v1"))
    assert before
    assert after
    assert after.value == before.value


async def test_the_way_back_names_what_needs_new_instances(operator: Operator) -> None:
    await operator.publish("v1")
    key = release_key(operator.app, "v1")
    await operator.etcdctl(key, '{"file": "file:///m.tar", "batch_size": 8, "custom_values": {"net": "detect"}}')
    await operator.register("v1")
    await operator.register("v1", id_="j")
    back = await roll_back(operator)
    assert list(back.warnings) == [
        f"{key}: batch_size, custom_values: 2 instances have loaded other content: start them again to apply this"
    ]
    # What instances follow without a start is not named.
    await operator.publish("v1", desc="text", weight=2.0)
    assert not (await roll_back(operator)).warnings


async def test_the_way_back_is_guarded(operator: Operator) -> None:
    await two_versions(operator)
    await promote(operator, "v2", exclusive=True)
    await operator.deregister("v1")
    with pytest.raises(FailedPrecondition, match="ready instance"):
        await roll_back(operator)
    await roll_back(operator, force=True)
    assert await operator.phases() == {"v1": "production", "v2": "staging"}


async def test_without_history_there_is_no_way_back(operator: Operator) -> None:
    with pytest.raises(NotFound, match="no history"):
        await roll_back(operator)


async def test_large_values_are_left_out(operator: Operator) -> None:
    await operator.etcdctl(release_key(operator.app, "v1"), '{"file": "file:///m.tar", "desc": "%s"}' % ("x" * 600_000))
    change = (await operator.history())[0]
    assert change.keys[0].omitted
    assert not change.keys[0].HasField("after")
    with pytest.raises(FailedPrecondition, match="too large"):
        await roll_back(operator)


async def test_compacted_changes_leave_a_mark(etcd: Etcd) -> None:
    async with operating(etcd, "app") as operator:
        await operator.publish("v1")
    async with EtcdClient(Connection([etcd.address])) as client:
        await client.put(release_key("app", "v2"), '{"file": "file:///m.tar"}')
        etcd.ctl("compact", str(await client.put("/ava/serving/worker/default", "{}")))
    async with operating(etcd, "app") as operator:
        revision = await operator.client.put("/ava/serving/app/metadata/end", "{}")
        async with asyncio.timeout(10):
            await operator.recorder.reached(revision)
        unknown, change, *_ = await operator.history()
        assert (change.keys[0].key, change.keys[0].omitted) == (release_key("app", "v2"), True)
        # What was deleted meanwhile is unknown, so no way leads back behind it.
        assert (unknown.keys[0].key, unknown.keys[0].omitted) == ("", True)
        with pytest.raises(FailedPrecondition, match="can't be undone"):
            await roll_back(operator, revision=change.revision)
