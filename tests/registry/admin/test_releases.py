"""Publishing, promoting, splitting and deleting versions, against a real etcd."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from atserving.admin.v1 import admin_pb2
from atserving.config import PREFIX, app_routing_key, release_key, worker_keys
from atserving.errors import Aborted, AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from atserving.http2_stream import Headers
from atserving.rpc import Context
from atserving.v1 import etcd_pb2
from registry.etcd import EtcdUnavailable
from tests.processes import Etcd
from tests.registry.admin.conftest import CONTEXT, Operator, operating

STAGING, PRODUCTION = admin_pb2.PHASE_STAGING, admin_pb2.PHASE_PRODUCTION


async def promote(operator: Operator, version: str, **fields: Any) -> admin_pb2.Release:
    request = admin_pb2.PromoteReleaseRequest(app=operator.app, version=version, **fields)
    return await operator.service.promote_release(request, CONTEXT)


async def demote(operator: Operator, version: str, **fields: Any) -> admin_pb2.Release:
    request = admin_pb2.DemoteReleaseRequest(app=operator.app, version=version, **fields)
    return await operator.service.demote_release(request, CONTEXT)


async def split(operator: Operator, weights: dict[str, float], **fields: Any) -> admin_pb2.App:
    request = admin_pb2.SplitAppRequest(app=operator.app, weights=weights, **fields)
    return await operator.service.split_app(request, CONTEXT)


async def delete(operator: Operator, version: str, **fields: Any) -> None:
    request = admin_pb2.DeleteReleaseRequest(app=operator.app, version=version, **fields)
    await operator.service.delete_release(request, CONTEXT)


async def app_of(operator: Operator) -> admin_pb2.App:
    return await operator.service.get_app(admin_pb2.GetAppRequest(app=operator.app), CONTEXT)


async def two_versions(operator: Operator) -> None:
    """v1 in production, v2 in staging, both with an instance."""
    await operator.publish("v1", phase=PRODUCTION)
    await operator.publish("v2")
    await operator.register("v1")
    await operator.register("v2")


async def test_exclusive_is_refused_while_gates_may_use_a_malformed_version(operator: Operator) -> None:
    await two_versions(operator)
    await split(operator, {"v1": 1, "v2": 1})
    await operator.etcdctl(release_key(operator.app, "v1"), "{oops")
    for change in (promote(operator, "v2", exclusive=True), split(operator, {"v2": 1}, exclusive=True)):
        with pytest.raises(FailedPrecondition, match="/v1 in etcd is malformed"):
            await change
    await operator.etcdctl(release_key(operator.app, "v1"), None)
    await promote(operator, "v2", exclusive=True)
    assert await operator.phases() == {"v2": "production"}


async def test_a_weight_of_zero_is_no_promotion(operator: Operator) -> None:
    await two_versions(operator)
    await split(operator, {"v1": 1, "v2": 0})
    await demote(operator, "v2")
    assert (await promote(operator, "v2")).warnings == ["weight: 0, so it gets no requests without a version"]
    promoted = await promote(operator, "v2", exclusive=True)
    assert (promoted.HasField("weight"), list(promoted.warnings)) == (False, [])
    assert [(each.version, each.share) for each in (await app_of(operator)).shares] == [("v2", 1.0)]


async def test_a_split_by_capacity_has_no_weights(operator: Operator) -> None:
    await two_versions(operator)
    await operator.register("v2", "more", capacity=8)
    await split(operator, {"v1": 9, "v2": 1})
    app = await split(operator, {}, by_capacity=True)
    assert [(each.version, each.HasField("weight"), each.share) for each in app.shares] == [
        ("v1", False, 0.25),
        ("v2", False, 0.75),
    ]
    with pytest.raises(InvalidArgument, match="by_capacity: "):
        await split(operator, {"v1": 1}, by_capacity=True)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0, 1e7])
async def test_a_wrong_weight_is_named(operator: Operator, weight: float) -> None:
    await two_versions(operator)
    with pytest.raises(InvalidArgument, match=r"weights\.v2: ") as wrong:
        await split(operator, {"v1": 1, "v2": weight})
    assert wrong.value.fields.keys() == {"weights.v2"}


async def test_a_published_release_reads_back(operator: Operator) -> None:
    given = admin_pb2.Release(
        batch_size=4, weight=0.5, use_device="GPU:1", desc="first", custom_files={"a": "https://h/a"}
    )
    given.custom_values.update({"net": "classify", "input_scale": 0.5, "limits": [1, 2.5], "deep": {"on": True}})
    stored = await operator.publish(
        "v1",
        batch_size=4,
        weight=0.5,
        use_device="GPU:1",
        desc="first",
        custom_files=given.custom_files,
        custom_values=given.custom_values,
    )
    assert stored.phase == STAGING
    assert stored.etag
    assert len(stored.digest) == 64
    assert stored.lastmodified.seconds
    found = await operator.service.get_release(admin_pb2.GetReleaseRequest(app=operator.app, version="v1"), CONTEXT)
    assert found == stored
    kv = await operator.client.get(release_key(operator.app, "v1"))
    assert kv
    # Whole numbers stay integers, as etcdctl's users and the nets expect.
    assert b'"limits":[1,2.5]' in kv.value


async def test_the_same_release_again_changes_nothing(operator: Operator) -> None:
    first = await operator.publish("v1", desc="one")
    again = await operator.publish("v1", desc="one")
    assert again == first
    assert len(await operator.history()) == 1
    amended = await operator.publish("v1", desc="two")
    assert amended.desc == "two"
    assert amended.etag != first.etag


async def test_other_content_is_refused(operator: Operator) -> None:
    await operator.publish("v1")
    with pytest.raises(AlreadyExists, match="different batch_size, file"):
        await operator.publish("v1", file="file:///other.tar", batch_size=2)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("file", {"file": "m.tar"}),
        ("file", {"file": "file:///m.tar#sha256=12"}),
        ("custom_files.a", {"custom_files": {"a": "x"}}),
        ("batch_size", {"batch_size": 0}),
        ("weight", {"weight": -1.0}),
        ("use_device", {"use_device": "TPU"}),
    ],
)
async def test_a_wrong_field_is_named(operator: Operator, field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await operator.publish("v1", **fields)
    assert list(caught.value.fields) == [field]
    assert not await operator.phases()


async def test_a_number_too_large_for_a_double_is_refused(operator: Operator) -> None:
    release = admin_pb2.Release()
    release.custom_values.update({"seed": float(1 << 60)})
    with pytest.raises(InvalidArgument, match="53 bits"):
        await operator.publish("v1", custom_values=release.custom_values)


async def test_validate_only_changes_nothing(operator: Operator) -> None:
    release = admin_pb2.Release(app=operator.app, version="v1", file="file:///m.tar")
    request = admin_pb2.CreateReleaseRequest(release=release, validate_only=True)
    would = await operator.service.create_release(request, CONTEXT)
    assert would.file == "file:///m.tar"
    assert not await operator.phases()


async def test_promotion_needs_a_ready_instance(operator: Operator) -> None:
    await operator.publish("v1", phase=PRODUCTION)
    await operator.register("v1")
    await operator.publish("v2")
    with pytest.raises(FailedPrecondition, match=r"no instance of \w+/v2 is ready"):
        await promote(operator, "v2")
    with pytest.raises(FailedPrecondition, match="no instance"):
        await operator.publish("v3", phase=PRODUCTION)
    await promote(operator, "v2", force=True)
    assert await operator.phases() == {"v1": "production", "v2": "production"}


async def test_an_outdated_instance_does_not_count(operator: Operator) -> None:
    await two_versions(operator)
    await operator.etcdctl(release_key(operator.app, "v2"), '{"file": "file:///changed.tar"}')
    with pytest.raises(FailedPrecondition, match="no instance"):
        await promote(operator, "v2")


async def test_an_exclusive_promotion_is_one_step(operator: Operator) -> None:
    await two_versions(operator)
    await promote(operator, "v2", exclusive=True)
    assert await operator.phases() == {"v1": "staging", "v2": "production"}
    change = (await operator.history())[0]
    assert change.method == "PromoteRelease"
    assert len(change.keys) == 2


async def test_the_last_version_stays_in_production(operator: Operator) -> None:
    await two_versions(operator)
    with pytest.raises(FailedPrecondition, match="no version in production with a ready instance"):
        await demote(operator, "v1")
    # A version without an instance does not help callers.
    await promote(operator, "v2")
    await operator.deregister("v2")
    with pytest.raises(FailedPrecondition, match="ready instance"):
        await demote(operator, "v1")
    with pytest.raises(FailedPrecondition, match="ready instance"):
        await split(operator, {"v1": 0, "v2": 1})
    await demote(operator, "v1", force=True)
    assert await operator.phases() == {"v1": "staging", "v2": "production"}


async def test_an_update_is_guarded_too(operator: Operator) -> None:
    await two_versions(operator)
    request = admin_pb2.UpdateReleaseRequest(release=admin_pb2.Release(app=operator.app, version="v1", phase=STAGING))
    with pytest.raises(FailedPrecondition, match="ready instance"):
        await operator.service.update_release(request, CONTEXT)


async def test_content_never_changes(operator: Operator) -> None:
    await operator.publish("v1")
    release = admin_pb2.Release(app=operator.app, version="v1", batch_size=3)
    with pytest.raises(InvalidArgument, match="publish a new version") as caught:
        await operator.service.update_release(admin_pb2.UpdateReleaseRequest(release=release), CONTEXT)
    assert list(caught.value.fields) == ["batch_size"]


async def test_a_mask_removes_what_the_release_lacks(operator: Operator) -> None:
    await operator.publish("v1", weight=2.0, desc="text")
    release = admin_pb2.Release(app=operator.app, version="v1", desc="new")
    request = admin_pb2.UpdateReleaseRequest(release=release)
    request.update_mask.paths[:] = ["desc", "weight"]
    stored = await operator.service.update_release(request, CONTEXT)
    assert stored.desc == "new"
    assert not stored.HasField("weight")


async def test_unknown_fields_of_an_operator_stay(operator: Operator) -> None:
    await operator.etcdctl(release_key(operator.app, "v1"), '{"file": "file:///m.tar", "ticket": "A-1"}')
    release = admin_pb2.Release(app=operator.app, version="v1", desc="new")
    stored = await operator.service.update_release(admin_pb2.UpdateReleaseRequest(release=release), CONTEXT)
    assert stored.desc == "new"
    kv = await operator.client.get(release_key(operator.app, "v1"))
    assert kv
    assert msgspec.json.decode(kv.value)["ticket"] == "A-1"


async def test_a_stale_etag_is_refused(operator: Operator) -> None:
    first = await operator.publish("v1")
    second = await operator.publish("v1", desc="other")
    release = admin_pb2.Release(app=operator.app, version="v1", desc="third", etag=first.etag)
    with pytest.raises(Aborted, match=f"its etag is {second.etag}"):
        await operator.service.update_release(admin_pb2.UpdateReleaseRequest(release=release), CONTEXT)
    release.etag = second.etag
    stored = await operator.service.update_release(admin_pb2.UpdateReleaseRequest(release=release), CONTEXT)
    assert stored.desc == "third"


async def test_an_apps_etag_follows_deletions(operator: Operator) -> None:
    await operator.publish("v1")
    await operator.publish("v2")
    before = (await app_of(operator)).etag
    await delete(operator, "v1")
    assert (await app_of(operator)).etag != before
    await operator.register("v2")
    etag = (await app_of(operator)).etag
    await split(operator, {"v2": 1}, etag=etag)
    with pytest.raises(Aborted):
        await split(operator, {"v2": 2}, etag=etag)


async def test_of_writers_at_once_none_is_lost(operator: Operator) -> None:
    await operator.publish("v0", phase=PRODUCTION)
    await operator.register("v0")
    versions = [f"v{number}" for number in range(1, 7)]
    for version in versions:
        await operator.publish(version)
        await operator.register(version)
    await asyncio.gather(*(promote(operator, version) for version in versions), return_exceptions=True)
    done = [version for version, phase in (await operator.phases()).items() if phase == "production"]
    methods = [change.method for change in await operator.history()]
    assert methods.count("PromoteRelease") == len(done) - 1


async def test_two_demotions_at_once_leave_one_version(operator: Operator) -> None:
    for version in ("v1", "v2"):
        await operator.publish(version)
        await operator.register(version)
    await promote(operator, "v1")
    await promote(operator, "v2")
    outcomes = await asyncio.gather(demote(operator, "v1"), demote(operator, "v2"), return_exceptions=True)
    assert sum(isinstance(each, FailedPrecondition) for each in outcomes) == 1
    assert sorted((await operator.phases()).values()) == ["production", "staging"]


async def test_a_split_says_what_each_version_gets(operator: Operator) -> None:
    await two_versions(operator)
    app = await split(operator, {"v1": 9, "v2": 1})
    assert {each.version: round(each.share, 3) for each in app.shares} == {"v1": 0.9, "v2": 0.1}
    assert (await operator.phases())["v2"] == "production"
    await operator.deregister("v2")
    shares = {each.version: each.share for each in (await app_of(operator)).shares}
    assert shares == {"v1": 1.0, "v2": 0.0}


async def test_without_weights_shares_follow_capacity(operator: Operator) -> None:
    await two_versions(operator)
    await operator.register("v2", "j", capacity=12)
    await promote(operator, "v2")
    shares = {each.version: each.share for each in (await app_of(operator)).shares}
    assert shares == {"v1": 0.2, "v2": 0.8}


@pytest.mark.parametrize("weights", [{}, {"v1": 0.0}, {"v1": -1.0}, {"v1": 1e9}])
async def test_wrong_weights_are_refused(operator: Operator, weights: dict[str, float]) -> None:
    await two_versions(operator)
    with pytest.raises(InvalidArgument):
        await split(operator, weights)
    with pytest.raises(NotFound, match="v9"):
        await split(operator, {"v9": 1})


async def test_a_lost_answer_of_etcd_is_no_failure(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    await two_versions(operator)
    await operator.deregister("v2")
    txn = operator.client.txn
    lost: list[object] = []

    async def losing(*arguments: Any) -> etcd_pb2.TxnResponse:
        response = await txn(*arguments)
        if response.succeeded and len(arguments[1]) > 1 and not lost:
            lost.append(response)
            raise EtcdUnavailable("no answer came")
        return response

    monkeypatch.setattr(operator.client, "txn", losing)
    service, app = operator.service, operator.app
    context = Context(Headers())
    await service.set_alias(admin_pb2.SetAliasRequest(app=app, alias="next", version="v1"), context)
    assert lost.pop()
    # The audit log has the revision that it wrote all the same.
    written = (await operator.client.get_below([app_routing_key(app)], []))[0][0].mod_revision
    assert context.notes["revision"] == written > context.notes["revision_before"]
    await service.delete_alias(admin_pb2.DeleteAliasRequest(app=app, alias="next"), CONTEXT)
    assert lost.pop()
    etag = (await service.get_release(admin_pb2.GetReleaseRequest(app=app, version="v2"), CONTEXT)).etag
    await delete(operator, "v2", etag=etag)
    assert lost.pop()
    assert await operator.phases() == {"v1": "production"}


async def test_a_removal_of_what_is_not_there_changes_nothing(operator: Operator) -> None:
    before = await operator.publish("v1")
    request = admin_pb2.UpdateReleaseRequest(
        release=admin_pb2.Release(app=operator.app, version="v1"), update_mask=FieldMask(paths=["desc", "weight"])
    )
    assert (await operator.service.update_release(request, CONTEXT)).etag == before.etag
    await operator.etcdctl(app_routing_key(operator.app), '{ "key_header": "x-user" }')
    etag = (await app_of(operator)).etag
    update = admin_pb2.UpdateAppRequest(app=admin_pb2.App(name=operator.app, key_header="x-user"))
    assert (await operator.service.update_app(update, CONTEXT)).etag == etag


async def test_deletion_waits_for_the_instances(operator: Operator) -> None:
    await two_versions(operator)
    await operator.etcdctl(worker_keys(operator.app, "v2")[0], '{"timeout": "2s"}')
    with pytest.raises(FailedPrecondition, match=r"still has instances \(1\)"):
        await delete(operator, "v2")
    await operator.deregister("v2")
    await delete(operator, "v2")
    assert await operator.phases() == {"v1": "production"}
    assert await operator.client.get(worker_keys(operator.app, "v2")[0]) is None
    with pytest.raises(NotFound):
        await delete(operator, "v2")


async def test_an_alias_keeps_its_version(operator: Operator) -> None:
    await two_versions(operator)
    await operator.etcdctl(app_routing_key(operator.app), '{"aliases": {"next": "v2"}, "note": "mine"}')
    await operator.deregister("v2")
    with pytest.raises(FailedPrecondition, match="alias 'next'"):
        await delete(operator, "v2")
    await delete(operator, "v2", force=True)
    kv = await operator.client.get(app_routing_key(operator.app))
    assert kv
    assert msgspec.json.decode(kv.value) == {"note": "mine"}


async def test_an_app_goes_as_a_whole(operator: Operator) -> None:
    await operator.publish("v1")
    await operator.register("v1")
    await operator.etcdctl(app_routing_key(operator.app), '{"aliases": {"next": "v1"}}')
    request = admin_pb2.DeleteAppRequest(app=operator.app)
    with pytest.raises(FailedPrecondition, match="instances"):
        await operator.service.delete_app(request, CONTEXT)
    await operator.deregister("v1")
    await operator.service.delete_app(request, CONTEXT)
    with pytest.raises(NotFound):
        await app_of(operator)
    assert len((await operator.history())[0].keys) == 2


async def test_a_malformed_release_is_not_overwritten(operator: Operator) -> None:
    await operator.etcdctl(release_key(operator.app, "v1"), "{")
    with pytest.raises(FailedPrecondition, match="malformed"):
        await operator.publish("v1")
    with pytest.raises(FailedPrecondition, match="malformed"):
        await promote(operator, "v1")
    await delete(operator, "v1", force=True)


async def test_deletions_by_calls_are_not_held_back_and_others_are(etcd: Etcd) -> None:
    async with operating(etcd, "app", hold_s=600) as operator:
        versions = [f"v{number}" for number in range(6)]
        for version in versions:
            await operator.publish(version)
        for version in versions[:4]:
            await delete(operator, version)
        assert not operator.mirror.view.holdback.held
        assert list(operator.mirror.view.by_app) == ["app"]
        await operator.publish("v6")
        for version in ("v4", "v5"):
            await operator.etcdctl(release_key("app", version), None)
        assert operator.mirror.view.holdback.held == {release_key("app", "v5")}
        with pytest.raises(FailedPrecondition, match="still in use"):
            await delete(operator, "v6")


async def test_an_emptied_etcd_is_no_call(etcd: Etcd) -> None:
    async with operating(etcd, "app", hold_s=600) as operator:
        keys = {release_key("app", (await operator.publish(f"v{number}")).version) for number in range(3)}
        etcd.ctl("del", "--prefix", PREFIX)
        await operator.seen(await operator.client.put(app_routing_key("other"), "{}"))
        assert operator.mirror.view.holdback.held == keys
        assert keys <= operator.mirror.view.entries.keys()
        # The way back: one after the other.
        with pytest.raises(FailedPrecondition, match="still in use"):
            await operator.publish("v9")
        for number in range(3):
            await operator.publish(f"v{number}")
        assert not operator.mirror.view.holdback.held
