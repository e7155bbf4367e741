"""A slow app whose callers send large requests leaves room in a gate to other apps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from google.api import httpbody_pb2

from atserving.config import Release, release_key
from atserving.counting import MAX_REQUEST_BYTES
from atserving.grpc_server import Server
from atserving.transport import channel
from atserving.v1 import edge_pb2, serving_pb2
from gate.callers import Callers
from gate.server import EdgeService, ServingService
from tests.gate.test_dispatch import Evaluator, Mesh, running_mesh
from tests.shared.scripted_server import failure
from tests.waiting import until

REQUEST_BYTES = 6 << 20
# Of 64 MiB, 48 are for large requests: the most that an app may hold twice over what is free.
PLACES, REQUESTS = 5, 8


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with running_mesh() as mesh:
        mesh.put(release_key("other", "v1"), Release(name="other", version="v1", file="file:///x", phase="production"))
        await mesh.add(Evaluator("other"), app="other")
        yield mesh


@pytest.fixture
async def client(mesh: Mesh) -> AsyncIterator[grpc.aio.Channel]:
    server = Server([], MAX_REQUEST_BYTES, mesh.held)
    ServingService(mesh.dispatcher, 1000, mesh.held, Callers()).register(server)
    EdgeService(mesh.dispatcher, 1000, mesh.held, Callers()).register(server)
    port = await server.start("127.0.0.1:0")
    async with channel(f"127.0.0.1:{port}") as client:
        yield client
    await server.stop(0)


def typed(app: str, size: int) -> serving_pb2.EvalRequest:
    return serving_pb2.EvalRequest(app=app, data=[serving_pb2.Resource(body=bytes(size))])


def rest(app: str, size: int) -> edge_pb2.EdgeEvalRequest:
    body = httpbody_pb2.HttpBody(content_type="application/octet-stream", data=bytes(size))
    return edge_pb2.EdgeEvalRequest(app=app, body=body)


def rest_batch(app: str, size: int) -> httpbody_pb2.HttpBody:
    document = b'[{"op":"/v1/eval/%s","data":{"uri":"data:;base64,%s"}}]' % (app.encode(), b"A" * size)
    return httpbody_pb2.HttpBody(content_type="application/json", data=document)


KINDS: dict[str, Callable[[str, int], Any]] = {
    "ServingService/Eval": typed,
    "ServingService/Batch": lambda app, size: serving_pb2.BatchRequest(tasks=[typed(app, size)]),
    "EdgeService/Eval": rest,
    "EdgeService/Batch": rest_batch,
}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_slow_app_leaves_room_to_others(mesh: Mesh, client: grpc.aio.Channel, kind: str) -> None:
    hold = asyncio.Event()
    slow = Evaluator("slow", hold=hold)
    await mesh.add(slow)
    call: Any = client.unary_unary(f"/atserving.v1.{kind}", None, None)

    def ask(app: str, size: int) -> asyncio.Future[bytes]:
        asked: asyncio.Future[bytes] = asyncio.ensure_future(call(KINDS[kind](app, size).SerializeToString()))
        return asked

    waiting: list[asyncio.Future[bytes]] = []
    refused: list[asyncio.Future[bytes]] = []
    for _ in range(REQUESTS):
        asked = ask("app", REQUEST_BYTES)

        def begun(asked: asyncio.Future[bytes] = asked) -> bool:
            return asked.done() or slow.in_flight > len(waiting)

        await until(begun)
        (refused if asked.done() else waiting).append(asked)
    assert (len(waiting), len(refused)) == (PLACES, REQUESTS - PLACES)
    for each in refused:
        error = await failure(each)
        if kind.startswith("Serving"):
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error.details() == "the large requests of app 'app' hold as many bytes in this gate as they may"
            assert dict(error.trailing_metadata())["retry-after"] == "1"
        else:
            # The client tells of an HTTP status that is no success.
            assert error.details().endswith("429")
    # Small requests of the app have room, and other apps have it for large ones.
    small = ask("app", 1000)
    await until(lambda: slow.in_flight > PLACES)
    for size in (1000, 180_000, 8 << 20):
        await answered(ask("other", size), kind)
    hold.set()
    for each in (*waiting, small, ask("app", REQUEST_BYTES)):
        await answered(each, kind)
    assert mesh.held.held == 0


async def answered(asked: asyncio.Future[bytes], kind: str) -> None:
    """Wait for the answer. If it is one to a REST caller, the client misses the trailers of gRPC behind its body."""
    if kind.startswith("Serving"):
        await asked
    else:
        with pytest.raises(grpc.aio.AioRpcError, match="Data frame with END_STREAM"):
            await asked
