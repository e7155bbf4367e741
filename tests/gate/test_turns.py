"""Apps take turns while a gate has more requests than it passes on in one step, so a flood waits for itself."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
from msgspec.structs import replace

from atserving.config import AppMetadata, Release, release_key
from atserving.counting import MAX_REQUEST_BYTES
from atserving.grpc_server import Server
from atserving.transport import channel
from atserving.v1 import serving_pb2
from gate import turns
from gate.admission import Caller
from gate.batch import run_batch
from gate.callers import Callers
from gate.dispatch import CallContext
from gate.server import ServingService
from gate.turns import AT_ONCE, NEXT, Turns
from reliability.frames import DATA, HEADERS, frame, http2_headers, http2_start
from tests.gate.test_dispatch import Evaluator, Mesh, running_mesh, task
from tests.processes import Gate, running_registry
from tests.shared.scripted_server import count_frames, failure
from tests.waiting import until

FLOOD = 600


@pytest.fixture
async def mesh(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    # All have to wait, as in a gate that is never done.
    monkeypatch.setattr(turns, "AT_ONCE", 0)
    async with running_mesh() as mesh:
        mesh.put(release_key("other", "v1"), Release(name="other", version="v1", file="file:///x", phase="production"))
        yield mesh


@pytest.fixture
async def client(mesh: Mesh) -> AsyncIterator[grpc.aio.Channel]:
    server = Server([], MAX_REQUEST_BYTES, mesh.held)
    ServingService(mesh.dispatcher, 1000, mesh.held, Callers()).register(server)
    port = await server.start("127.0.0.1:0")
    async with channel(f"127.0.0.1:{port}") as client:
        yield client
    await server.stop(0)


def asked(client: grpc.aio.Channel, app: str) -> asyncio.Future[bytes]:
    request = serving_pb2.EvalRequest(app=app, data=[serving_pb2.Resource(body=b"image")])
    call = client.unary_unary("/atserving.v1.ServingService/Eval", None, None)(request.SerializeToString())
    return asyncio.ensure_future(call)


async def test_apps_take_turns_one_request_each() -> None:
    waiting, order = Turns(), ""
    assert [waiting.is_free() for _ in range(AT_ONCE + 1)] == [True] * AT_ONCE + [False]

    def begin(name: str) -> None:
        nonlocal order
        order += name

    for name in "aaaabbc":
        assert not waiting.is_free()
        waiting.wait(name, lambda name=name: begin(name))  # type: ignore[misc] # the name of this turn
    assert len(waiting) == 7
    await until(lambda: not len(waiting))
    assert order == "abcabaa"


async def test_each_step_begins_only_some() -> None:
    waiting = Turns()
    begun: list[int] = []
    for number in range(3 * AT_ONCE):
        waiting.wait("a", lambda number=number: begun.append(number))  # type: ignore[misc] # the number of this turn
    await asyncio.sleep(0)
    assert begun == list(range(NEXT))
    assert not waiting.is_free(), "others came first"
    await until(lambda: len(begun) == 3 * AT_ONCE)
    for _ in range(2):
        assert [waiting.is_free() for _ in range(AT_ONCE + 1)] == [True] * AT_ONCE + [False]
        await asyncio.sleep(0)


async def test_a_turn_that_fails_does_not_hold_up_the_others() -> None:
    waiting, begun = Turns(), asyncio.Event()
    told: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    waiting.wait("a", lambda: 1 // 0)  # type: ignore[arg-type] # it fails
    waiting.wait("a", begun.set)
    await begun.wait()
    assert [type(each["exception"]) for each in told] == [ZeroDivisionError]


async def test_a_request_passes_a_flood_for_another_app(mesh: Mesh, client: grpc.aio.Channel) -> None:
    """All come over one connection, as from Envoy, and the flood is first."""
    hold = asyncio.Event()
    flooded = Evaluator("a", hold=hold)
    before: list[int] = []
    await mesh.add(flooded)
    widen(mesh, 2 * FLOOD)
    await mesh.add(Evaluator("b", on_request=lambda: before.append(in_flight(mesh, "app"))), app="other")
    # The links are open.
    await asked(client, "other")
    before.clear()
    flood = [asked(client, "app") for _ in range(FLOOD)]
    await asked(client, "other")
    # Some went at once, and some in each of the few steps until the evaluator has the request.
    assert len(before) == 1
    assert before[0] < FLOOD / 2
    hold.set()
    await asyncio.gather(*flood, return_exceptions=True)
    assert len(mesh.dispatcher.turns) == 0


def widen(mesh: Mesh, capacity: int) -> None:
    """Let the only instance of the app take more requests."""
    (endpoint,) = mesh.router._endpoints["app", "v1"].values()
    mesh.put(endpoint.instance.key, replace(endpoint.instance, capacity=capacity))


def in_flight(mesh: Mesh, app: str) -> int:
    pool = mesh.router._endpoints[app, "v1"]
    return sum(each.in_flight for each in pool.values())


async def test_a_gate_that_has_fallen_behind_lets_apps_take_turns(tmp_path: Path) -> None:
    """All requests lie ready when the process goes on, so it reads them in one step of its own loop."""
    with running_registry(tmp_path) as registry:
        for app in ("app", "other"):
            registry.publish(app)
        gate = Gate([registry.address])
        try:
            gate.start()
            await asyncio.to_thread(gate.logged, event="service ready")
            host, _, port = gate.address.partition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(http2_start() + raw_request("app", 1))
            await count_frames(reader, HEADERS, 1)
            gate.freeze()
            # So many fit into what the kernel keeps for it.
            apps = ["app"] * 200 + ["other"]
            writer.write(b"".join(raw_request(app, 3 + 2 * number) for number, app in enumerate(apps)))
            await writer.drain()
            gate.send(signal.SIGCONT)
            await count_frames(reader, HEADERS, len(apps))
            writer.close()
            await until(lambda: len(finished(gate)) == len(apps) + 1)
            order = finished(gate)
        finally:
            gate.kill()
    # None has an instance, so each is at its end when it is its turn.
    assert order.index("other") <= 2 * AT_ONCE


def finished(gate: Gate) -> list[str]:
    """Return the apps of the requests that a gate has finished, in order."""
    return [json.loads(line)["app"] for line in gate.lines if "request finished" in line]


def raw_request(app: str, stream: int) -> bytes:
    """Return the frames of an eval."""
    request = serving_pb2.EvalRequest(app=app, data=[serving_pb2.Resource(body=b"image")]).SerializeToString()
    headers = http2_headers("/atserving.v1.ServingService/Eval", "application/grpc")
    message = b"\0" + len(request).to_bytes(4) + request
    return frame(HEADERS, 4, stream, headers) + frame(DATA, 1, stream, message)


async def test_few_tasks_of_batches_begin_in_a_step(mesh: Mesh) -> None:
    """The answers of all that run come at once, and all could go on in one step."""
    hold = asyncio.Event()
    evaluator = Evaluator("a", hold=hold)
    await mesh.add(evaluator)
    widen(mesh, 2 * FLOOD)
    call = CallContext("batch", Caller())
    batches = [asyncio.create_task(run_batch(mesh.dispatcher, [task()] * 100, call, 32, mesh.held)) for _ in range(16)]
    (endpoint,) = mesh.router._endpoints["app", "v1"].values()
    most = 0

    async def watch() -> None:
        nonlocal most
        last = endpoint.requests
        while True:
            await asyncio.sleep(0)
            most, last = max(most, endpoint.requests - last), endpoint.requests

    watching = asyncio.create_task(watch())
    await until(lambda: evaluator.in_flight == 16 * 32)
    hold.set()
    results = [each for batch in batches for each in await batch]
    watching.cancel()
    assert len(results) == 1600
    assert not [each for each in results if isinstance(each, Exception)]
    assert 0 < most <= AT_ONCE


async def test_an_app_with_too_many_waiting_is_refused(
    mesh: Mesh, client: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "MOST_WAITING", 10)
    monkeypatch.setattr(turns, "NEXT", 0)
    flood = [asked(client, "app") for _ in range(10)]
    await until(lambda: len(mesh.dispatcher.turns) == 10)
    error = await failure(asked(client, "app"))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details() == "too many requests to app 'app' wait in this gate"
    assert dict(error.trailing_metadata())["retry-after"] == "1"
    # Another app has its own places; what will be refused in any case has places together.
    mesh.put("/ava/serving/app/metadata/closed", AppMetadata(public=False))
    mesh.put(release_key("closed", "v1"), Release(name="closed", version="v1", file="file:///x", phase="production"))
    others = [asked(client, name) for name in ("other", "closed", *(f"unknown-{number}" for number in range(9)))]
    await until(lambda: len(mesh.dispatcher.turns) == 21)
    for name in ("unknown-9", "closed"):
        assert "too many" in (await failure(asked(client, name))).details()
    assert mesh.dispatcher.turns.refused == 3
    monkeypatch.setattr(turns, "NEXT", NEXT)
    details = [(await failure(each)).details() for each in (*flood, *others)]
    assert details[0] == details[9] == "no instance of app 'app' is ready"
    assert "'closed' is not public" in details[11]
    assert details[12] == "unknown app 'unknown-0'"


async def test_a_caller_who_leaves_takes_the_request_along(
    mesh: Mesh, client: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "NEXT", 0)
    evaluator = Evaluator("a")
    await mesh.add(evaluator)
    leaving, staying = asked(client, "app"), asked(client, "app")
    await until(lambda: len(mesh.dispatcher.turns) == 2)
    leaving.cancel()
    await until(lambda: mesh.held._calls == 1)
    monkeypatch.setattr(turns, "NEXT", NEXT)
    await staying
    assert len(evaluator.received) == 1
