"""The API of two registries on one etcd. Each test has an app of its own."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import grpc.aio
import pytest
from google.protobuf import json_format

from atserving import transport
from atserving.admin.v1 import admin_pb2, admin_pb2_grpc
from atserving.config import PREFIX, release_key
from atserving.follower import ConfigFollower
from atserving.v1 import registry_pb2, registry_pb2_grpc
from registry import messages
from registry.etcd import Connection, EtcdClient
from registry.view import Delta
from tests.processes import Etcd, Registry, evaluator
from tests.waiting import until, until_async

_numbers = itertools.count()


@dataclass
class Api:
    """The stubs of one registry's services."""

    registry: registry_pb2_grpc.RegistryServiceAsyncStub
    operators: admin_pb2_grpc.AdminServiceAsyncStub

    async def publish(self, app: str, version: str = "1", **fields: object) -> admin_pb2.Release:
        fields = {"app": app, "version": version, "file": "file:///m.tar", **fields}
        release = json_format.ParseDict(fields, admin_pb2.Release())
        return await self.operators.CreateRelease(admin_pb2.CreateReleaseRequest(release=release))

    async def listed(self, app: str) -> admin_pb2.ListReleasesResponse:
        return await self.operators.ListReleases(admin_pb2.ListReleasesRequest(app=app))

    async def register(self, app: str, **fields: object) -> float:
        instance = one_instance(app, **fields)
        request = registry_pb2.RegisterInstanceRequest(instance=instance)
        return (await self.registry.RegisterInstance(request)).ttl_ms / 1000

    async def deregister(self, app: str, **fields: object) -> None:
        instance = one_instance(app, **fields)
        await self.registry.DeregisterInstance(registry_pb2.DeregisterInstanceRequest(instance=instance))

    async def instances(self, app: str) -> list[str]:
        listed = await self.operators.ListInstances(admin_pb2.ListInstancesRequest(app=app))
        return [instance.address for instance in listed.instances]


def one_instance(app: str, **fields: object) -> registry_pb2.Instance:
    known = {"app": app, "version": "1", "id": "i", "address": "10.0.0.1:50052", "capacity": 4}
    return registry_pb2.Instance(**{**known, **fields})  # type: ignore[arg-type]


@pytest.fixture
async def apis(registries: list[Registry]) -> AsyncIterator[list[Api]]:
    async with transport.channel(registries[0].address) as one, transport.channel(registries[1].address) as two:
        yield [
            Api(registry_pb2_grpc.RegistryServiceStub(channel), admin_pb2_grpc.AdminServiceStub(channel))
            for channel in (one, two)
        ]


@pytest.fixture
def api(apis: list[Api]) -> Api:
    return apis[0]


@pytest.fixture
async def etcd_client(shared_etcd: Etcd) -> AsyncIterator[EtcdClient]:
    async with EtcdClient(Connection([shared_etcd.address])) as client:
        yield client


async def test_a_large_step_comes_in_parts_and_is_applied_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "PART_CHARS", 100)
    upserts = {f"{PREFIX}eval/a/{number}": '{"file": "file:///x"}' for number in range(20)}
    parts = list(messages.watch_responses(Delta(upserts, frozenset({"b", "c"}), 7, reset=True, stale=True)))
    assert [part.more for part in parts] == [True] * (len(parts) - 1) + [False]
    assert [part.reset for part in parts] == [True] + [False] * (len(parts) - 1)
    assert {part.stale for part in parts} == {True}
    assert {part.revision for part in parts} == {7}
    assert {entry.key: entry.value_json for part in parts for entry in part.upserts} == upserts
    assert [key for part in parts for key in part.deletes] == ["b", "c"]
    assert len(parts) > 5
    (empty,) = messages.watch_responses(Delta({}, frozenset(), 1, reset=True))
    assert empty.reset
    assert not empty.more


@pytest.fixture
def app() -> str:
    return f"app-{next(_numbers)}"


async def stored(client: EtcdClient, key: str) -> dict[str, object]:
    kv = await client.get(key)
    assert kv
    return dict(json.loads(kv.value))


def refused(code: grpc.StatusCode, words: str) -> pytest.RaisesExc[grpc.aio.AioRpcError]:
    """Expect a call to fail with a status, and with ``words`` in its message."""

    def fits(error: grpc.aio.AioRpcError) -> bool:
        return error.code() is code and words in (error.details() or "")

    return pytest.raises(grpc.aio.AioRpcError, check=fits)


async def test_a_release_is_stored_as_readable_json(api: Api, etcd_client: EtcdClient, app: str) -> None:
    release = await api.publish(
        app,
        desc="first",
        image_width=225,
        batch_size=8,
        weight=0,
        use_device="GPU:1",
        custom_files={"labels": "https://host/labels.csv#sha256=" + "a" * 64},
        custom_values={"net": "classify", "limit": 2**53, "deep": {"a": [1, 2.5, None]}},
    )
    assert release.phase == admin_pb2.PHASE_STAGING
    assert await stored(etcd_client, release_key(app, "1")) == {
        "name": app,
        "version": "1",
        "file": "file:///m.tar",
        "phase": "staging",
        "desc": "first",
        "image_width": 225,
        "batch_size": 8,
        "weight": 0,
        "use_device": "GPU:1",
        "lastmodified": release.lastmodified.ToJsonString(),
        "custom_files": {"labels": "https://host/labels.csv#sha256=" + "a" * 64},
        "custom_values": {"net": "classify", "limit": 2**53, "deep": {"a": [1, 2.5, None]}},
    }
    assert list((await api.listed(app)).releases) == [release]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"custom_values": {"a": "x" * (1 << 20)}}, "bytes of JSON exceed the limit of 1048576"),
        ({name: {"a": [1] * 15_000} for name in ("custom_values", "model_params")}, "30"),
        ({"custom_files": {str(n): "file:///x" for n in range(1001)}}, "custom_files: 1001 files exceed"),
    ],
    ids=["bytes", "values", "files"],
)
async def test_a_costly_release_is_refused(api: Api, app: str, fields: dict[str, object], words: str) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, words):
        await api.publish(app, "1", **fields)


async def test_heartbeats_to_any_registry_keep_an_instance_registered(
    apis: list[Api], etcd_client: EtcdClient, app: str
) -> None:
    await apis[0].publish(app)
    ttl_s = await apis[0].register(app)
    key = one_instance_key(app)
    first = await etcd_client.get(key)
    assert first
    # Send heartbeats to both registries in turn, until a lease without renewals has expired.
    lease = await etcd_client.grant(round(ttl_s))
    unrenewed = f"/unrenewed/{app}"
    await etcd_client.put(unrenewed, "", lease.id)
    turns = itertools.cycle(apis)

    async def heartbeat() -> bool:
        assert await next(turns).register(app) == ttl_s
        return await is_deleted(etcd_client, unrenewed)

    await until_async(heartbeat)
    assert await etcd_client.get(key) == first
    await until_async(lambda: are_listed(apis, app, ["10.0.0.1:50052"]))
    # Without heartbeats the instance is deregistered.
    await until_async(lambda: are_listed(apis, app, []))


async def are_listed(apis: list[Api], app: str, addresses: list[str]) -> bool:
    return all([await api.instances(app) == addresses for api in apis])


def one_instance_key(app: str) -> str:
    return f"{PREFIX}instance/{app}/1/i"


async def test_deregistration_is_immediate_and_idempotent(apis: list[Api], etcd_client: EtcdClient, app: str) -> None:
    await apis[0].publish(app)
    await apis[0].register(app)
    kv = await etcd_client.get(one_instance_key(app))
    assert kv
    await apis[1].deregister(app, address="")
    assert await etcd_client.get(one_instance_key(app)) is None
    await apis[0].deregister(app)
    await until_async(lambda: are_listed(apis, app, []))
    # The lease has ended too.
    await etcd_client.revoke(kv.lease)


async def test_a_heartbeat_rewrites_a_changed_or_lost_instance(api: Api, etcd_client: EtcdClient, app: str) -> None:
    await api.publish(app)
    await api.register(app)
    await api.register(app, capacity=9)
    assert (await stored(etcd_client, one_instance_key(app)))["capacity"] == 9

    async def is_back() -> bool:
        # The first heartbeats may find it in a mirror that has not heard of the loss.
        await api.register(app)
        kv = await etcd_client.get(one_instance_key(app))
        return kv is not None and json.loads(kv.value)["capacity"] == 4

    for lose in (etcd_client.delete, lambda key: revoke_lease_of(etcd_client, key)):
        await lose(one_instance_key(app))
        await until_async(is_back)
    # The registry adds a lease to a key that an operator wrote without one.
    await etcd_client.put(one_instance_key(app), json.dumps({"address": "10.0.0.1:50052", "capacity": 4}))

    async def has_lease() -> bool:
        await api.register(app)
        kv = await etcd_client.get(one_instance_key(app))
        return kv is not None and kv.lease != 0

    await until_async(has_lease)


async def revoke_lease_of(client: EtcdClient, key: str) -> None:
    kv = await client.get(key)
    assert kv
    await client.revoke(kv.lease)


async def test_both_registries_can_register_one_instance_at_once(apis: list[Api], app: str) -> None:
    await apis[0].publish(app)
    await asyncio.gather(*(api.register(app) for api in apis for _ in range(4)))
    await until_async(lambda: are_listed(apis, app, ["10.0.0.1:50052"]))


async def test_instances_of_a_version_have_the_same_files(apis: list[Api], app: str) -> None:
    await apis[0].publish(app)
    one, two = "1" * 64, "2" * 64
    await apis[0].register(app, files=one)
    for _ in range(2):
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "instance i has loaded other files"):
            await apis[1].register(app, id="other", files=two)
    await apis[1].register(app, id="same", files=one)
    await apis[1].register(app, id="unknown")
    # Those of other content are set aside by their digest.
    await apis[1].register(app, id="older", files=two, digest="3" * 64)
    for id_ in ("i", "same", "older"):
        await apis[0].deregister(app, id=id_)
    await apis[1].register(app, id="other", files=two)


async def test_of_two_instances_with_other_files_that_register_at_once_one_is_refused(
    apis: list[Api], app: str
) -> None:
    for attempt in range(10):
        await apis[0].publish(app, str(attempt))
        calls = (
            api.register(app, version=str(attempt), id=f"i{number}", files=str(number) * 64)
            for number, api in enumerate(apis)
        )
        ended = await asyncio.gather(*calls, return_exceptions=True)
        (error,) = (each for each in ended if isinstance(each, grpc.aio.AioRpcError))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_files_that_the_release_names_by_digest_are_not_compared(api: Api, app: str) -> None:
    await api.publish(app, file=f"file:///m.tar#sha256={'a' * 64}")
    await api.register(app, files="1" * 64)
    await api.register(app, id="other", files="2" * 64)


async def test_an_instance_needs_a_published_release(api: Api, etcd_client: EtcdClient, app: str) -> None:
    with refused(grpc.StatusCode.NOT_FOUND, f"release {app}/1 is not published"):
        await api.register(app)
    await api.publish(app)
    await api.register(app)
    await etcd_client.delete(release_key(app, "1"))

    async def is_refused() -> bool:
        # The first heartbeats may find the release in a mirror that has not heard of its deletion.
        try:
            await api.register(app)
        except grpc.aio.AioRpcError as error:
            return error.code() is grpc.StatusCode.NOT_FOUND
        return False

    await until_async(is_refused)
    await until_async(lambda: is_deleted(etcd_client, one_instance_key(app)))


async def is_deleted(client: EtcdClient, key: str) -> bool:
    return await client.get(key) is None


@pytest.mark.parametrize(
    "fields", [{"id": "a/b"}, {"version": ""}, {"address": "host"}, {"address": "host:70000"}, {"capacity": 0}]
)
async def test_a_wrong_instance_is_refused(api: Api, app: str, fields: dict[str, object]) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, f"instance.{next(iter(fields))}: "):
        await api.register(app, **fields)


async def test_a_watch_of_one_app_streams_the_app_and_the_defaults(
    api: Api, etcd_client: EtcdClient, app: str, registries: list[Registry]
) -> None:
    other = f"{app}-other"
    await api.publish(app)
    await api.publish(other)
    call = api.registry.Watch(registry_pb2.WatchRequest(app=app))
    first = await call.read()
    assert isinstance(first, registry_pb2.WatchResponse)
    assert first.reset
    assert [entry.key for entry in first.upserts if "default" not in entry.key] == [release_key(app, "1")]
    await api.publish(other, "2")
    revision = await etcd_client.put(f"{PREFIX}worker/default", json.dumps({"timeout": "5s", "for": app}))
    second = await call.read()
    assert isinstance(second, registry_pb2.WatchResponse)
    assert [entry.key for entry in second.upserts] == [f"{PREFIX}worker/default"]
    assert (second.reset, second.revision) == (False, revision)
    call.cancel()
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "app: 'a b' should match"):
        await api.registry.Watch(registry_pb2.WatchRequest(app="a b")).read()


async def test_two_registries_serve_the_same_config(
    apis: list[Api], registries: list[Registry], etcd_client: EtcdClient, app: str
) -> None:
    followers = [ConfigFollower([registry.address]) for registry in registries]
    tasks = [asyncio.create_task(follower.run()) for follower in followers]
    for follower in followers:
        await follower.synced.wait()
    for number in range(20):
        await apis[number % 2].publish(app, str(number))
    last = release_key(app, "19")
    await until(lambda: all(last in follower.entries for follower in followers))
    assert followers[0].entries == followers[1].entries
    assert (await apis[0].listed(app)) == (await apis[1].listed(app))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_an_instance_whose_key_is_gone_registers_at_once(lasting: Registry) -> None:
    lasting.publish("gone")
    with evaluator(lasting, "gone") as process:
        process.logged(event="instance registered")
        (before,) = lasting.instances("gone")
        # Its next heartbeat is minutes away.
        lasting.delete(f"instance/gone/v1/{before['id']}")
        await until(lambda: lasting.instances("gone") == [before])
