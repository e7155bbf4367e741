"""Slow peers are bounded in time and in number. The bootstrap's own values are shortened here."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import aiohttp
import grpc.aio
import orjson
import pytest
import pytest_asyncio

from atserving import transport
from reliability.frames import DATA, HEADERS, RST_STREAM, frame, http2_headers, http2_start
from tests.envoy.fake_gate import NEVER, SIZES, SLOW
from tests.envoy.rig import EVAL, TYPED_EVAL, Edge, eval_request
from tests.waiting import PATIENCE_S, until_async

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONNECTIONS = 20
LEAVING = 1500


def hurried(bootstrap: Any) -> None:
    """Shorten each time and lower each number that is in the bootstrap; a KeyError shows one that is not."""
    listener = bootstrap["static_resources"]["listeners"][0]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    options = manager["common_http_protocol_options"]
    limits = bootstrap["layered_runtime"]["layers"][0]["static_layer"]
    user_timeout = listener["socket_options"][0]
    assert user_timeout["name"] == socket.TCP_USER_TIMEOUT
    for holder, name, value in (
        (listener, "per_connection_buffer_high_watermark_timeout", "1s"),
        (manager, "request_headers_timeout", "1s"),
        (manager, "request_timeout", "2s"),
        (manager, "stream_flush_timeout", "1s"),
        (options, "max_connection_duration", "1s"),
        (limits, "envoy.resource_limits.listener.edge.connection_limit", CONNECTIONS),
    ):
        assert holder[name]
        holder[name] = value
    # An old connection takes new requests for so long.
    manager["drain_timeout"] = "1s"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def edge() -> AsyncIterator[Edge]:
    async with Edge(change=hurried) as edge:
        yield edge


async def ended(edge: Edge, reader: asyncio.StreamReader) -> bytes:
    """Wait until Envoy closes a connection, while others are answered; return what has come."""
    said = b""

    async def read() -> None:
        nonlocal said
        with suppress(ConnectionError):
            while part := await reader.read(1 << 16):
                said += part

    reading = asyncio.create_task(read())
    async with asyncio.timeout(PATIENCE_S):
        while not reading.done():
            assert (await edge.ask())[0] == 200
            await asyncio.wait({reading}, timeout=0.1)
    return said


async def trickle(writer: asyncio.StreamWriter, part: bytes) -> None:
    with suppress(ConnectionError):
        while True:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.05)


CHUNKED = (
    f"POST {EVAL} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/octet-stream\r\n"
    "transfer-encoding: chunked\r\n\r\n"
).encode()


@pytest.mark.parametrize(
    ("start", "part", "status"),
    [
        (eval_request(missing=1_000_000), b"x", 408),
        (CHUNKED, b"1\r\nx\r\n", 408),
        (CHUNKED, b"1;" + b"x" * 1000 + b"\r\nx\r\n", 408),
        (CHUNKED + b"1;", b"x" * 1000, 408),
        (CHUNKED + b"1\r\nx\r\n0\r\nx: ", b"y", 408),
        (f"POST {EVAL} HTTP/1.1\r\nhost: localhost\r\nx: ".encode(), b"y", 408),
    ],
    ids=["body", "chunks", "extensions", "one extension", "trailers", "headers"],
)
async def test_a_request_that_trickles_in_is_a_408(edge: Edge, start: bytes, part: bytes, status: int) -> None:
    reader, writer = await edge.connect()
    writer.write(start)
    trickling = asyncio.create_task(trickle(writer, part))
    said = await ended(edge, reader)
    trickling.cancel()
    writer.close()
    assert said.startswith(f"HTTP/1.1 {status} ".encode()), said[:200]
    assert orjson.loads(said.partition(b"\r\n\r\n")[2])["code"] == status


async def test_an_answer_that_nobody_reads_is_broken_off(edge: Edge) -> None:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await asyncio.to_thread(connection.connect, ("127.0.0.1", edge.ports.edge))
    connection.sendall(eval_request(b"large"))

    async def active() -> int:
        return await edge.stat("http.edge.downstream_cx_active")

    async def answered() -> bool:
        return await edge.stat("cluster.gate.upstream_flow_control_paused_reading_total") > 0

    async def closed() -> bool:
        assert (await edge.ask())[0] == 200
        return await active() == 0

    await until_async(answered, what="the answer waits for its reader")
    await until_async(closed, what="Envoy has closed the connection")
    connection.setblocking(True)
    received = 0
    with suppress(ConnectionError):
        while part := connection.recv(1 << 20):
            received += len(part)
    assert received < SIZES[b"large"]
    connection.close()


async def test_the_end_of_an_answer_whose_window_stays_closed_is_reset(edge: Edge) -> None:
    reader, writer = await edge.connect()
    writer.write(http2_start() + frame(HEADERS, 4, 1, http2_headers(EVAL, "application/octet-stream")))
    writer.write(frame(DATA, 1, 1, b"middle"))
    async with asyncio.timeout(PATIENCE_S):
        while (head := await reader.readexactly(9))[3] != RST_STREAM:
            await reader.readexactly(int.from_bytes(head[:3]))
            assert (await edge.ask())[0] == 200
    writer.close()


async def test_callers_that_leave_at_once_break_no_connection_to_a_gate(edge: Edge) -> None:
    """Other callers share it."""
    active, floods = "cluster.gate.upstream_rq_active", "cluster.gate.http2.outbound_control_flood"
    leaving = []
    for _ in range(LEAVING // 100):
        _, writer = await edge.connect()
        leaving.append(writer)
        writer.write(http2_start())
        for stream in range(1, 200, 2):
            writer.write(frame(HEADERS, 4, stream, http2_headers(EVAL, "application/octet-stream")))
            writer.write(frame(DATA, 1, stream, NEVER))

    async def waiting() -> bool:
        return await edge.stat(active) == LEAVING

    async def left() -> bool:
        return await edge.stat(active) == 0

    await until_async(waiting, what="the gates have every request")
    for writer in leaving:
        writer.transport.abort()
    await until_async(left, what="every request has left")
    assert await edge.stat(floods) == 0


async def test_more_connections_than_the_limit_are_closed_and_operators_still_get_in(edge: Edge) -> None:
    held = [await edge.connect() for _ in range(CONNECTIONS)]
    for _, writer in held:
        writer.write(http2_start())

    async def full() -> bool:
        return await edge.stat("http.edge.downstream_cx_active") == CONNECTIONS

    await until_async(full, what="the listener is full")
    reader, writer = await edge.connect()
    async with asyncio.timeout(PATIENCE_S):
        with suppress(ConnectionError):
            assert await reader.read() == b""
    writer.close()
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{edge.ports.ops}/live") as response:
        assert response.status == 200
    for _, each in held:
        each.close()

    async def roomy() -> bool:
        return (await edge.ask())[0] == 200

    await until_async(roomy, ConnectionError, IndexError, what="callers get in again")


def without_silence(bootstrap: Any) -> None:
    """Let few connections in, and none for long that sends no request."""
    listener = bootstrap["static_resources"]["listeners"][0]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    options = manager["common_http_protocol_options"]
    limits = bootstrap["layered_runtime"]["layers"][0]["static_layer"]
    limits["envoy.resource_limits.listener.edge.connection_limit"] = CONNECTIONS
    manager["drain_timeout"] = "1s"
    for holder, name in ((listener, "listener_filters_timeout"), (options, "idle_timeout")):
        assert holder[name]
        holder[name] = "1s"


@pytest.mark.parametrize("said", [b"", http2_start()], ids=["nothing", "no request"])
async def test_connections_without_a_request_leave_room_to_others(said: bytes) -> None:
    async with Edge(change=without_silence) as edge:
        overflow = f"listener.127.0.0.1_{edge.ports.edge}.downstream_cx_overflow"
        held = []

        async def full() -> bool:
            for _ in range(CONNECTIONS + 1):
                reader, writer = await edge.connect()
                held.append((reader, writer))
                writer.write(said)
            return await edge.stat(overflow) > 0

        async def roomy() -> bool:
            return (await edge.ask())[0] == 200

        await until_async(full, what="the listener is full")
        await until_async(roomy, ConnectionError, IndexError, what="callers get in again")
        for reader, writer in held:
            async with asyncio.timeout(PATIENCE_S):
                with suppress(ConnectionError):
                    await reader.read()
            writer.close()


def impatient(bootstrap: Any) -> None:
    """Allow requests to stand still for a moment, as Envoy does while memory is short."""
    manager = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    assert manager["stream_idle_timeout"]
    manager["stream_idle_timeout"] = "1s"


async def test_a_request_that_stands_still_for_too_long_is_a_503() -> None:
    text = "the edge holds as many requests as it can"
    async with Edge(change=impatient) as edge, transport.channel(f"127.0.0.1:{edge.ports.edge}") as channel:
        answer = await edge.raw(eval_request(NEVER))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 1\r\n" in answer
        assert orjson.loads(answer.partition(b"\r\n\r\n")[2]) == {"code": 503, "message": text}
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(TYPED_EVAL, None, None)(NEVER)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, text)


async def test_an_old_connection_ends_after_its_requests(edge: Edge) -> None:
    old = "http.edge.downstream_cx_max_duration_reached"
    before = await edge.stat(old)
    async with transport.channel(f"127.0.0.1:{edge.ports.edge}") as channel:
        assert await channel.unary_unary(TYPED_EVAL, None, None)(SLOW) == SLOW
    assert await edge.stat(old) > before
