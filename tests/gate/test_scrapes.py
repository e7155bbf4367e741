"""A gate's process serves its metrics: whatever names callers make up, under load, and without a registry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

import grpc.aio
import pytest
import pytest_asyncio

from atserving.transport import channel
from atserving.v1 import serving_pb2, serving_pb2_grpc
from tests.gate.scrapes import Scrape, scrape
from tests.gate.test_dispatch import Evaluator
from tests.instance import ScriptedInstance
from tests.processes import Gate, Registry, running_registry
from tests.waiting import until_async

pytestmark = pytest.mark.asyncio(loop_scope="module")

MADE_UP = 10_000
BATCH = 1000
LOAD, AT_ONCE = 600, 16


@dataclass
class Mesh:
    """A gate's process, with an instance in the process of the test."""

    registry: Registry
    gate: Gate
    evaluator: Evaluator
    http_port: int

    async def scrape(self) -> Scrape:
        return await scrape(self.http_port)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    with running_registry(tmp_path_factory.mktemp("mesh")) as registry:
        registry.publish("app", phase="production")
        evaluator = Evaluator("a")
        server = ScriptedInstance(evaluator.infer, "app", "v1", "a")
        instance = await server.start()
        fields = {"app": "app", "version": "v1", "id": "a", "address": instance.address, "capacity": 64}
        registry.put("instance/app/v1/a", fields)
        gate = Gate([registry.address], "--http", "127.0.0.1:0")
        gate.start()
        try:
            ready = await asyncio.to_thread(gate.logged, event="service ready")
            mesh = Mesh(registry, gate, evaluator, ready["http_port"])
            await until_async(lambda: gate.eval("app"), grpc.aio.AioRpcError)
            yield mesh
        finally:
            gate.kill()
            await server.stop()


def request(app: str = "app", size: int = 5) -> serving_pb2.EvalRequest:
    return serving_pb2.EvalRequest(app=app, data=[serving_pb2.Resource(body=bytes(size))])


async def test_ten_thousand_made_up_apps_are_one_series(mesh: Mesh) -> None:
    with suppress(grpc.aio.AioRpcError):
        await mesh.gate.eval("made-up")
    before = await mesh.scrape()
    async with channel(mesh.gate.address) as to_gate:
        stub = serving_pb2_grpc.ServingServiceStub(to_gate)
        for start in range(0, MADE_UP, BATCH):
            tasks = [request(f"made-up-{start + number}") for number in range(BATCH)]
            await stub.Batch(serving_pb2.BatchRequest(tasks=tasks))
    found = await mesh.scrape()
    unknown = {"app": "", "version": "", "code": "404"}
    assert found.value("requests_total", **unknown) - before.value("requests_total", **unknown) == MADE_UP
    assert found.by("reason", "refusals_total", app="")["unknown"] >= MADE_UP
    assert len(found.samples) == len(before.samples)
    assert {each.labels["app"] for each in found.samples if "app" in each.labels} == {"", "app"}


async def test_scrapes_during_load_lose_no_request(mesh: Mesh) -> None:
    before = (await mesh.scrape()).value("requests_total", app="app", version="v1", code="200")
    seen = [before]
    left = iter(range(LOAD))
    async with channel(mesh.gate.address) as to_gate:
        stub = serving_pb2_grpc.ServingServiceStub(to_gate)

        async def ask() -> None:
            for _ in left:
                assert (await stub.Eval(request())).result_json

        asking = asyncio.gather(*(ask() for _ in range(AT_ONCE)))
        while not asking.done():
            found = await mesh.scrape()
            seen.append(found.value("requests_total", app="app", version="v1", code="200"))
            assert 0 <= found.value("requests_in_flight", app="app") <= AT_ONCE
        await asking
    found = await mesh.scrape()
    seen.append(found.value("requests_total", app="app", version="v1", code="200"))
    assert seen == sorted(seen)
    assert seen[-1] - before == LOAD
    assert found.value("request_seconds_count", app="app") == found.value("requests_total", app="app")
    assert found.value("attempts_total", app="app", version="v1") >= seen[-1]
    assert found.by("state", "instances", app="app", version="v1") == {"connected": 1}


async def test_connections_and_held_bytes_are_those_of_now(mesh: Mesh) -> None:
    async def settled(connections: int, least: int) -> bool:
        found = await mesh.scrape()
        return found.value("connections") == connections and found.value("held_bytes") >= least

    await until_async(lambda: settled(0, 0))
    assert (await mesh.scrape()).value("held_bytes") == 0
    hold = mesh.evaluator.hold = asyncio.Event()
    async with channel(mesh.gate.address) as to_gate:
        asking = asyncio.ensure_future(serving_pb2_grpc.ServingServiceStub(to_gate).Eval(request(size=2 << 20)))
        await until_async(lambda: settled(1, 2 << 20))
        found = await mesh.scrape()
        assert found.value("max_held_bytes") == 256 << 20
        assert found.value("requests_in_flight", app="app") == 1
        assert found.value("connections_refused_total") == 0
        hold.set()
        await asking
    mesh.evaluator.hold = None
    await until_async(lambda: settled(0, 0))


async def test_the_config_tells_its_revision_and_ages_without_a_registry(mesh: Mesh) -> None:
    first = await mesh.scrape()
    assert first.value("config_followed") == 1
    assert first.value("config_age_seconds") == 0
    mesh.registry.put("app/metadata/other", {"public": True})

    async def newer() -> bool:
        return (await mesh.scrape()).value("config_revision") == first.value("config_revision") + 1

    await until_async(newer)
    mesh.registry.kill()

    async def alone() -> bool:
        found = await mesh.scrape()
        return found.value("config_followed") == 0 and found.value("config_age_seconds") > 0

    await until_async(alone)
    assert await newer()
    mesh.registry.start()

    async def followed() -> bool:
        found = await mesh.scrape()
        return found.value("config_followed") == 1 and found.value("config_age_seconds") == 0

    await until_async(followed)
