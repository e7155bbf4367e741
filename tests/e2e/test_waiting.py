"""Through Envoy, a request for a version without an instance is told to come back, or waits until one serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import orjson
import pytest
import pytest_asyncio

from atserving import transport
from atserving.config import PREFIX
from atserving.local.mesh import Mesh
from atserving.v1 import serving_pb2, serving_pb2_grpc
from tests.e2e.client import Client, data_uri, image
from tests.gate.scrapes import scrape
from tests.processes import Gate, etcdctl, running_registry, start_evaluator
from tests.waiting import PATIENCE_S, until, until_async

pytestmark = pytest.mark.asyncio(loop_scope="session")

APP = "sleeper"
FILE = (Path(__file__).parents[2] / "examples" / "digits" / "digits-v1.tar").as_uri()
HOLD = {"wait_for_instance": f"{2 * PATIENCE_S:g}s", "timeout": f"{2 * PATIENCE_S:g}s"}
PATH = f"/v1/eval/{APP}/v1"


def put(mesh: Mesh, key: str, value: dict[str, Any]) -> None:
    etcdctl(mesh.etcd, "put", PREFIX + key, orjson.dumps(value).decode())


@pytest_asyncio.fixture(loop_scope="session")
async def sleeper(client: Client) -> AsyncIterator[Client]:
    """A client of a mesh that has a release in staging without an instance."""
    await publish(client)
    yield client
    await forget(client)


@pytest_asyncio.fixture(loop_scope="session")
async def holding(client: Client) -> AsyncIterator[Client]:
    """The same, of a mesh whose gates hold requests for it."""
    put(client.mesh, f"worker/app/{APP}/release/v1", HOLD)
    await publish(client)
    yield client
    await forget(client)


async def publish(client: Client) -> None:
    """Publish the release, and wait until the gate knows it, and all that was written before."""
    put(client.mesh, f"eval/{APP}/v1", {"file": FILE})
    await until_said(client, "has no version")


async def forget(client: Client) -> None:
    for key in ("worker/app", "eval"):
        etcdctl(client.mesh.etcd, "del", "--prefix", f"{PREFIX}{key}/{APP}/")
    await until_said(client, "unknown app")


async def until_said(client: Client, said: str) -> None:
    async def is_said() -> bool:
        answer = await client.bytes(f"/v1/eval/{APP}/none", b"x")
        return said in str(answer.json["message"])

    await until_async(is_said, what=f"the gate says {said!r}")


async def ask(client: Client) -> Any:
    return await client.bytes(PATH, image("7.png"))


async def ask_grpc(mesh: Mesh) -> serving_pb2.EvalResponse:
    resource = serving_pb2.Resource(body=image("7.png"))
    async with transport.channel(f"127.0.0.1:{mesh.ports.edge}") as channel:
        stub = serving_pb2_grpc.ServingServiceStub(channel)
        return await stub.Eval(serving_pb2.EvalRequest(app=APP, version="v1", data=[resource]))


async def waiting(mesh: Mesh) -> float:
    """Return how many requests wait for an instance, as the gate's metrics say."""
    (target,) = [each for each in mesh.targets() if each["labels"] == {"job": "gate", "process": "gate"}]
    addresses = target["targets"]
    assert isinstance(addresses, list)
    found = await scrape(int(addresses[0].rpartition(":")[2]))
    return found.value("requests_waiting_for_instance", app=APP, version="v1")


async def until_waiting(mesh: Mesh, count: int) -> None:
    async def reached() -> bool:
        return await waiting(mesh) == count

    await until_async(reached, what=f"{count} requests wait")


async def test_without_an_instance_callers_are_told_when_to_come_back(sleeper: Client) -> None:
    answer = await ask(sleeper)
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert answer.json["message"] == f"no instance of version 'v1' of app '{APP}' is ready"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask_grpc(sleeper.mesh)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    trailers: Any = caught.value.trailing_metadata()
    assert dict(trailers)["retry-after"] == "5"


async def test_requests_of_all_kinds_wait_until_an_evaluator_serves(holding: Client) -> None:
    batch = [{"op": PATH, "data": data_uri("5.jpg")}] * 2
    asking = [
        asyncio.create_task(each) for each in (ask(holding), ask_grpc(holding.mesh), holding.json("/v1/batch", batch))
    ]
    # Of a batch one waits, and the others behind it.
    await until_waiting(holding.mesh, 3)
    evaluator = start_evaluator(holding.mesh.registry, APP)
    try:
        http, typed, batched = await asyncio.gather(*asking)
        assert (http.status, http.best, http.headers["x-serving-version"]) == (200, "seven", "v1")
        assert '"seven"' in typed.result_json
        assert [each["code"] for each in batched.json] == [0, 0]
        # An instance that has crashed stays registered for a while; its successor answers.
        evaluator.kill()
        again = asyncio.create_task(ask(holding))
        await until_waiting(holding.mesh, 1)
        successor = start_evaluator(holding.mesh.registry, APP)
        try:
            assert (await again).status == 200
        finally:
            successor.kill()
    finally:
        evaluator.kill()


async def test_a_caller_who_leaves_waits_no_more(holding: Client) -> None:
    asking = [asyncio.create_task(each) for each in (ask(holding), ask_grpc(holding.mesh))]
    await until_waiting(holding.mesh, 2)
    for each in asking:
        each.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await until_waiting(holding.mesh, 0)


async def test_a_gate_that_stops_goes_on_holding_requests(tmp_path: Path) -> None:
    with running_registry(tmp_path) as registry:
        registry.publish("app")
        registry.put("worker/default", HOLD)
        gate = Gate([registry.address], "--http", "127.0.0.1:0", "--grace", str(PATIENCE_S))
        gate.start()
        try:
            port = gate.logged("http_port")["http_port"]
            asking = asyncio.create_task(gate.eval("app", "v1"))

            async def waits() -> bool:
                return (await scrape(port)).value("requests_waiting_for_instance", app="app") == 1

            await until_async(waits, what="the request waits")
            gate.terminate()
            await until(lambda: any('"service draining"' in line for line in gate.lines), "the gate stops")
            evaluator = start_evaluator(registry.address, "app")
            try:
                assert '"seven"' in (await asking).result_json
                assert await asyncio.to_thread(gate.wait) == 0
            finally:
                evaluator.kill()
        finally:
            gate.kill()
