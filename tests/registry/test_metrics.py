"""The metrics of a registry: each follows what operators, instances, followers and etcd do."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from atserving import transport
from atserving.admin.v1 import admin_pb2, admin_pb2_grpc
from atserving.config import PREFIX
from atserving.local.ports import free_ports
from atserving.v1 import registry_pb2, registry_pb2_grpc
from registry.inventory import Inventory
from registry.view import Delete, Put, View
from tests.processes import Etcd, Process, Registry, running_registry
from tests.registry.test_operators import add
from tests.registry.test_server import Api, one_instance
from tests.waiting import until_async

Start = Callable[[Process], Process]
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class Scrape(dict[tuple[str, ...], float]):
    """The samples of one scrape, by the name without its prefix and the values of the labels, sorted by their names.

    0 for others.
    """

    def __missing__(self, _: tuple[str, ...]) -> float:
        return 0.0


class Scraper:
    """Scrapes a registry as Prometheus does."""

    def __init__(self, registry: Registry) -> None:
        port = registry.logged(event="service ready")["http_port"]
        self._url = f"http://127.0.0.1:{port}/metrics"

    async def scrape(self, accept: str = "") -> Scrape:
        def read() -> str:
            request = urllib.request.Request(self._url, headers={"accept": accept})
            with urllib.request.urlopen(request, timeout=20) as page:
                text: str = page.read().decode()
                return text

        parse = parse_openmetrics if accept else parse_text
        found = Scrape()
        for family in parse(await asyncio.to_thread(read)):
            for sample in family.samples:
                labels = (value for _, value in sorted(sample.labels.items()))
                found[sample.name.removeprefix("atserving_registry_"), *labels] = sample.value
        return found

    async def until(self, holds: Callable[[Scrape], object]) -> Scrape:
        """Scrape until a condition holds; return that scrape."""
        last = Scrape()

        async def held() -> object:
            nonlocal last
            last = await self.scrape()
            return holds(last)

        await until_async(held, what="the metrics are as wanted")
        return last


@asynccontextmanager
async def calling(address: str) -> AsyncIterator[Api]:
    async with transport.channel(address) as channel:
        yield Api(registry_pb2_grpc.RegistryServiceStub(channel), admin_pb2_grpc.AdminServiceStub(channel))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry on an etcd that nobody else uses, for tests with an app of their own each."""
    with running_registry(tmp_path_factory.mktemp("metrics"), "--lease-ttl", "10m") as registry:
        yield registry


@pytest.fixture
async def own(etcd: Etcd, tmp_path: Path, processes: Start) -> Registry:
    """A registry of the test's own, on an etcd of its own."""
    started = Registry(tmp_path, [etcd.address])
    processes(started)
    await asyncio.to_thread(started.wait_serving)
    return started


@pytest.fixture
async def api(registry: Registry) -> AsyncIterator[Api]:
    async with calling(registry.address) as api:
        yield api


@pytest.fixture
def scraper(registry: Registry) -> Scraper:
    return Scraper(registry)


async def test_changes_move_the_mirror_the_config_and_the_history(
    registry: Registry, api: Api, scraper: Scraper
) -> None:
    before = await scraper.scrape()
    began_s = time.time()
    await api.publish("changed")
    # The entry of the history is a step of its own.
    after = await scraper.until(
        lambda now: (
            now["mirror_revision",] == now["history_revision",]
            and now["history_entries_total",] > before["history_entries_total",]
        )
    )
    moved = {key[0]: after[key] - before[key] for key in after}
    (value,) = registry.etcdctl("get", "--print-value-only", f"{PREFIX}eval/changed/1").split()
    assert (moved["config_keys"], moved["config_bytes"]) == (1, len(value))
    assert moved["mirror_revision"] > 0
    assert after["mirror_etcd_revision",] >= after["mirror_revision",]
    assert moved["mirror_steps_total"] >= 2
    # The release, its note, the entry of the history, and how far that is.
    assert moved["mirror_events_total"] >= 4
    assert moved["history_entries_total"] == 1
    assert began_s - 1 <= after["history_written_timestamp_seconds",] <= time.time() + 1
    assert (after["mirror_snapshots_total",], moved["mirror_snapshots_total"]) == (1, 0)


async def test_malformed_and_held_keys_are_counted(own: Registry) -> None:
    scraper = Scraper(own)
    for name in ("a", "b", "c"):
        own.publish(name)
    own.etcdctl("put", f"{PREFIX}worker/default", "{")
    own.etcdctl("put", f"{PREFIX}operators/ada", "{")
    found = await scraper.until(lambda now: now["config_malformed_keys",] == 2)
    assert (found["config_keys",], found["config_held_keys",]) == (3, 0)
    own.etcdctl("del", "--prefix", PREFIX)
    # Nothing holds back the deletion of an operator.
    found = await scraper.until(lambda now: now["config_held_keys",] >= 3 and now["config_malformed_keys",] == 1)
    assert found["config_keys",] == 3


async def test_calls_are_counted_by_method_and_code(api: Api, scraper: Scraper) -> None:
    before = await scraper.scrape()
    await api.publish("called")
    with pytest.raises(grpc.aio.AioRpcError):
        await api.operators.SetAlias(admin_pb2.SetAliasRequest(app="called", alias="live", version="none"))
    with pytest.raises(grpc.aio.AioRpcError):
        await api.operators.DeleteRelease(admin_pb2.DeleteReleaseRequest(app="called", version="1", etag="5"))
    await api.listed("called")
    for accept in ("", OPENMETRICS):
        after = await scraper.scrape(accept)
        moved = {key[1:]: after[key] - before[key] for key in after if key[0] == "calls_total"}
        assert moved["200", "CreateRelease"] == moved["200", "ListReleases"] == 1
        assert moved["409", "DeleteRelease"] == 1
        assert sum(number for (_, method), number in moved.items() if method == "SetAlias") == 1
        assert ("200", "SetAlias") not in moved
        assert after["call_seconds_count", "CreateRelease"] == after["calls_total", "200", "CreateRelease"]
        assert 0 < after["call_seconds_sum", "CreateRelease"] < 60
        if accept:
            continue
        bounds = [key[1] for key in after if key[0] == "call_seconds_bucket" and key[2] == "CreateRelease"]
        assert (bounds[0], bounds[-2]) == ("0.001", "30.0")


async def test_instances_and_their_leases_are_counted(registry: Registry, api: Api, scraper: Scraper) -> None:
    before = await scraper.scrape()
    with pytest.raises(grpc.aio.AioRpcError):
        await api.register("leased")
    await api.publish("leased")
    found = await scraper.scrape()
    assert found["instances", "leased", "1"] == 0
    assert ("in_production", "leased", "1") not in found
    await api.register("leased")
    await api.register("leased", id="j", address="10.0.0.2:1")
    await api.register("leased")
    await scraper.until(lambda now: now["instances", "leased", "1"] == 2)
    await api.deregister("leased", id="j")
    await scraper.until(lambda now: now["instances", "leased", "1"] == 1)
    # So ends a lease that expires.
    (lease,) = registry.etcdctl("lease", "list").split()[3:]
    registry.etcdctl("lease", "revoke", lease)
    found = await scraper.until(lambda now: now["instances", "leased", "1"] == 0)
    moved = {key[1:]: found[key] - before[key] for key in found if key[0] == "leases_total"}
    assert moved == {("registered",): 2, ("renewed",): 1, ("deregistered",): 1, ("failed",): 1}
    assert found["instances_gone_total",] - before["instances_gone_total",] == 2
    await api.operators.DeleteRelease(admin_pb2.DeleteReleaseRequest(app="leased", version="1", force=True))
    await scraper.until(lambda now: ("instances", "leased", "1") not in now)


async def test_a_follower_comes_and_goes(api: Api, scraper: Scraper) -> None:
    await api.publish("followed")
    calls: dict[str, Any] = {
        "gate": api.registry.Watch(registry_pb2.WatchRequest()),
        "evaluator": api.registry.Watch(registry_pb2.WatchRequest(app="followed")),
        "operator": api.operators.WatchApp(admin_pb2.WatchAppRequest(app="followed")),
    }
    for kind, call in calls.items():
        await call.read()
        assert (await scraper.scrape())["followers", kind] == 1
    for call in calls.values():
        call.cancel()
    found = await scraper.until(lambda now: not any(now["followers", kind] for kind in calls))
    assert (found["calls_total", "499", "Watch"], found["calls_total", "499", "WatchApp"]) == (2, 1)
    assert all(("followers", kind) in found for kind in calls)
    assert not any("Watch" in key for key in found if key[0] == "call_seconds_count")


async def test_an_outage_of_etcd_is_seen(etcd: Etcd, own: Registry) -> None:
    scraper = Scraper(own)
    before = await scraper.until(lambda now: not now["mirror_stale",])
    etcd.kill()
    lost = await scraper.until(lambda now: now["mirror_stale",] and now["etcd_calls_total", "Range", "unavailable"])
    down = await scraper.until(lambda now: now["mirror_lag_seconds",] > lost["mirror_lag_seconds",])
    assert down["etcd_calls_total", "Watch", "unavailable"] >= 1
    assert down["mirror_snapshots_total",] == before["mirror_snapshots_total",]
    assert down["etcd_switches_total",] == 0
    etcd.start()
    up = await scraper.until(lambda now: not now["mirror_stale",])
    assert up["mirror_snapshots_total",] > before["mirror_snapshots_total",]
    assert up["etcd_calls_total", "Watch", "ok"] > before["etcd_calls_total", "Watch", "ok"]
    # While the watch is silent, the answers of its member prove that the mirror is current.
    assert (await scraper.until(lambda now: now["mirror_lag_seconds",] < up["mirror_lag_seconds",]))[
        "mirror_stale",
    ] == 0


async def test_a_registry_that_never_reached_etcd_is_stale(tmp_path: Path, processes: Start) -> None:
    etcd, port = free_ports(2)
    processes(Registry(tmp_path, [f"127.0.0.1:{etcd}"], "--http", f"127.0.0.1:{port}"))

    def read() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as page:
            text: str = page.read().decode()
            return text

    async def is_stale() -> bool:
        return "atserving_registry_mirror_stale 1.0" in await asyncio.to_thread(read)

    await until_async(is_stale, OSError, what="the mirror is stale")


async def test_refused_operators_are_counted(shared_etcd: Etcd, tmp_path: Path, processes: Start) -> None:
    file = tmp_path / "operators.json"
    token = add(file, "vic")
    started = Registry(tmp_path, [shared_etcd.address], "--operators", str(file))
    processes(started)
    await asyncio.to_thread(started.wait_serving)
    scraper = Scraper(started)
    request = admin_pb2.UpdateWorkerRequest(worker=admin_pb2.Worker(max_concurrent=7))
    async with calling(started.address) as api:
        for metadata in (None, (("authorization", f"Bearer {token}"),)):
            with pytest.raises(grpc.aio.AioRpcError):
                await api.operators.UpdateWorker(request, metadata=metadata)
        # Not an operator's method.
        with pytest.raises(grpc.aio.AioRpcError):
            await api.registry.RegisterInstance(
                registry_pb2.RegisterInstanceRequest(instance=one_instance("not-published"))
            )
    found = await scraper.scrape()
    assert (found["operators_refused_total", "401"], found["operators_refused_total", "403"]) == (1, 1)
    assert found["calls_total", "403", "UpdateWorker"] == 1


def entry(key: str) -> Put:
    app, version = key.removeprefix(PREFIX).split("/")[1:3]
    if "/eval/" in key:
        return Put(key, b'{"file": "file:///m.tar"}', 1)
    value = f'{{"app":"{app}","version":"{version}","id":"{key[-1]}","address":"10.0.0.1:1","capacity":1}}'
    return Put(key, value.encode(), 1)


def test_many_versions_are_few_series() -> None:
    view = View()
    names = [f"app{number}" for number in range(10_000)]
    view.replace([entry(f"{PREFIX}eval/{name}/v1") for name in names], 1)
    view.apply([entry(f"{PREFIX}instance/{name}/v1/i") for name in names], 2)
    found = list(view.inventory.instances())
    assert len(found) == 1001
    assert found[0] == ("app0", "v1", 1)
    assert found[-1] == ("", "", 9000)
    view.apply([Delete(key) for key in list(view.entries)], 3)
    assert list(view.inventory.instances()) == []
    assert (view.inventory.size, view.inventory.gone) == (0, 10_000)


def test_instances_without_a_release_are_counted() -> None:
    view = View()
    inventory: Inventory = view.inventory
    view.replace([entry(f"{PREFIX}eval/a/v1"), entry(f"{PREFIX}instance/b/v1/i"), entry(f"{PREFIX}instance/b/v1/j")], 1)
    assert sorted(inventory.instances()) == [("a", "v1", 0), ("b", "v1", 2)]
    # The same instance again.
    view.apply([entry(f"{PREFIX}instance/b/v1/i"), Delete(f"{PREFIX}eval/a/v1")], 2)
    assert (list(inventory.instances()), inventory.gone) == ([("b", "v1", 2)], 0)
    view.replace([entry(f"{PREFIX}instance/b/v1/j")], 3)
    assert (list(inventory.instances()), inventory.gone) == ([("b", "v1", 1)], 1)


def test_versions_in_production_are_those_that_get_requests_without_a_version() -> None:
    view = View()

    def release(version: str, fields: str) -> Put:
        return Put(f"{PREFIX}eval/a/{version}", b'{"file": "file:///m.tar"%s}' % fields.encode(), 1)

    phase = ', "phase": "production"'
    view.replace([release("staged", ""), release("v1", phase), release("none", phase + ', "weight": 0')], 1)
    assert list(view.inventory.production()) == [("a", "v1")]
    view.apply([release("v1", ', "phase": "staging"'), release("none", phase + ', "weight": 2')], 2)
    assert list(view.inventory.production()) == [("a", "none")]
    view.apply([Delete(f"{PREFIX}eval/a/none")], 3)
    assert list(view.inventory.production()) == []


async def test_a_follower_that_falls_behind_is_counted() -> None:
    view = View(queue_deltas=2)
    view.replace([], 1)
    with view.subscribe() as subscription:
        await subscription.next()
        for number in range(3):
            view.apply([entry(f"{PREFIX}eval/a/v{number}")], number + 2)
        assert view.fell_behind == 1
