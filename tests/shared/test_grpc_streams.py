"""The gRPC server bounds what open requests take before their bodies: headers, time, streaming calls, connections."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from atserving import http2, peer_watch
from atserving.grpc_server import Server
from atserving.transport import channel
from reliability.frames import DATA, HEADERS, PREFACE, SETTINGS, field, frame
from tests.shared.scripted_server import (
    HELD_BYTES,
    NOT_SERVING,
    REQUEST,
    WAIT_S,
    Scripted,
    calling,
    connections,
    count_frames,
    failure,
    method,
    running,
)
from tests.waiting import until, until_async

FEW = 256
MANY_HEADERS = field(b"x-many", b"v" * 15_000)
INDEXED = b"\x40" + field(b"x-one", b"")[1:]
# The dynamic table's first field, again and again: a byte each on the wire (RFC 7541, section 6.1).
REPEATED_HEADERS = INDEXED + b"\xbe" * 1500


@pytest.mark.parametrize("more", [MANY_HEADERS, REPEATED_HEADERS], ids=["long", "repeated"])
async def test_headers_of_requests_without_a_body_are_bounded(more: bytes) -> None:
    room = 4 << 20
    async with running() as scripted:
        assert scripted.held.take(HELD_BYTES * 3 // 4 - room, large=True)
        before = scripted.held.held
        reader, writer = await asyncio.open_connection("127.0.0.1", scripted.port)
        writer.write(PREFACE + frame(SETTINGS, 0, 0))
        for number in range(FEW + 400):
            writer.write(frame(HEADERS, 4, 1 + 2 * number, REQUEST + more))
            await writer.drain()
        await count_frames(reader, HEADERS, 100)
        (connection,) = await connections(scripted)
        assert FEW < len(connection._streams) < FEW + 300
        assert before < scripted.held.held <= before + room
        # Others have room.
        async with channel(f"127.0.0.1:{scripted.port}") as client:
            assert await method(client, "/test/Echo")(b"x", timeout=WAIT_S) == b"x"
        writer.transport.abort()
        await until(lambda: scripted.held.held == before, what="nothing is held")


async def test_calls_that_end_leave_nothing_behind() -> None:
    async with calling() as (scripted, client):
        count = FEW + 100
        for leave in (False, True):
            waiting = [asyncio.ensure_future(method(client, "/test/Wait")(b"", timeout=WAIT_S)) for _ in range(count)]
            await scripted.all_waiting(count)
            assert scripted.held.held > 100 * 4096
            for call, answer in zip(scripted.waiting, waiting, strict=True):
                if leave:
                    answer.cancel()
                else:
                    call.finish(b"done")
            await asyncio.wait(waiting)
            await until(lambda: scripted.held.held == 0, what="nothing is held")
            scripted.waiting.clear()
        waiting = [asyncio.ensure_future(method(client, "/test/Wait")(b"", timeout=WAIT_S)) for _ in range(FEW)]
        await scripted.all_waiting(FEW)
        assert scripted.held.held == FEW * 5
        for call in scripted.waiting:
            call.finish(b"")
        await asyncio.gather(*waiting)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_watch, "_TURN_S", 0.2)
    monkeypatch.setattr(http2, "_MOST_TURNS", 3)


@pytest.mark.usefixtures("hurried")
async def test_a_request_that_does_not_arrive_in_time_is_refused() -> None:
    async with calling() as (scripted, client):
        answered = asyncio.ensure_future(method(client, "/test/Wait")(b"whole", timeout=WAIT_S))
        await scripted.all_waiting(1)
        watching = health_pb2_grpc.HealthStub(client).Watch(health_pb2.HealthCheckRequest())
        assert (await watching.read()).status == NOT_SERVING

        async def endless() -> AsyncIterator[bytes]:
            yield b"part"
            await asyncio.Event().wait()

        late: Any = client.stream_unary("/test/Echo", None, None)
        for messages in (endless(), endless()):
            error = await failure(late(messages, timeout=WAIT_S))
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert error.details() == "the request did not arrive in time"
        # Those that wait for the server have as long as it needs.
        scripted.waiting[0].finish(b"answer")
        assert await answered == b"answer"
        await scripted.server.set_serving(True)
        assert (await watching.read()).status != NOT_SERVING
        watching.cancel()
        assert await method(client, "/test/Echo")(b"x", timeout=WAIT_S) == b"x"
        assert scripted.held.held == 0


async def streaming(
    scripted: Scripted, path: bytes, count: int, *, more: bytes = b"", messages: bytes = b""
) -> tuple[Any, Any]:
    """Open streaming calls with more headers, and send each these messages."""
    reader, writer = await asyncio.open_connection("127.0.0.1", scripted.port)
    writer.write(PREFACE + frame(SETTINGS, 0, 0))
    headers = REQUEST.replace(b"\x0a/test/Wait", bytes([len(path)]) + path) + more
    for number in range(count):
        writer.write(frame(HEADERS, 4, 1 + 2 * number, headers))
        if messages:
            writer.write(frame(DATA, 0, 1 + 2 * number, messages))
    return reader, writer


async def test_streaming_calls_are_bounded_and_take_no_room_of_others() -> None:
    async with running() as scripted:
        reader, writer = await streaming(scripted, b"/grpc.health.v1.Health/Watch", 1000, more=MANY_HEADERS)
        # Those that are let in wait for a message.
        await count_frames(reader, HEADERS, 100)
        assert scripted.held.held == 0
        async with channel(f"127.0.0.1:{scripted.port}") as client:
            assert await method(client, "/test/Echo")(b"x" * 1000, timeout=WAIT_S) == b"x" * 1000
            watch = health_pb2_grpc.HealthStub(client).Watch
            assert (await failure(watch(health_pb2.HealthCheckRequest()).read())).code() is (
                grpc.StatusCode.RESOURCE_EXHAUSTED
            )
            writer.transport.abort()
            await until(lambda: scripted.server._streaming_held.held == 0, what="the callers are gone")
            assert (await watch(health_pb2.HealthCheckRequest()).read()).status == NOT_SERVING


async def test_messages_that_wait_for_a_streaming_call_are_bounded() -> None:
    path = b"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    asked = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    async with calling() as (scripted, client):
        messages = (struct.pack(">BI", 0, len(asked)) + asked) * 1500
        reader, writer = await streaming(scripted, path, 200, messages=messages)
        await count_frames(reader, HEADERS, 200)
        assert scripted.server._streaming_held.held <= 16 << 20
        writer.transport.abort()
        await until(lambda: scripted.server._streaming_held.held == 0, what="the callers are gone")
        call = reflection_pb2_grpc.ServerReflectionStub(client).ServerReflectionInfo()
        for _ in range(3):
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            assert (await call.read()).list_services_response.service
        call.cancel()


async def test_a_server_with_a_bound_closes_connections_beyond_it() -> None:
    server = Server([], max_connections=2)
    port = await server.start("127.0.0.1:0")

    async def refused() -> bool:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(PREFACE + frame(SETTINGS, 0, 0))
        try:
            return not await reader.read(1)
        except ConnectionResetError:
            return True
        finally:
            writer.close()

    async with AsyncExitStack() as stack:
        stack.push_async_callback(server.stop, 0)
        for _ in range(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            stack.callback(writer.close)
            await reader.readexactly(9)
        assert await refused()
        writer.transport.abort()

        async def taken() -> bool:
            return not await refused()

        await until_async(taken, what="another connection has room")
