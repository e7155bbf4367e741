"""The gRPC server bounds the bytes that it holds, whatever its callers leave unfinished or unread."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from grpc_reflection.v1alpha import reflection_pb2

from atserving.transport import channel
from reliability.frames import DATA, HEADERS, PING, PREFACE, SETTINGS, WINDOW_UPDATE, frame
from tests.shared.scripted_server import (
    HELD_BYTES,
    MAX_BYTES,
    REQUEST,
    WAIT_S,
    calling,
    connections,
    count_frames,
    failure,
    method,
    read_until,
    request,
    running,
    true_if,
)
from tests.waiting import until_async


async def test_requests_beyond_what_the_server_may_hold_are_refused() -> None:
    async with calling() as (scripted, client):
        message = bytes(10 << 20)
        waiting = [asyncio.ensure_future(method(client, "/test/Wait")(message, timeout=WAIT_S)) for _ in range(4)]
        await scripted.all_waiting(4)
        error = await failure(method(client, "/test/Echo")(message, timeout=WAIT_S))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == "the server holds too many bytes"
        # Small ones still have room.
        assert await method(client, "/test/Echo")(b"x", timeout=WAIT_S) == b"x"
        for each in waiting:
            each.cancel()
        await scripted.all_gone(4)
        assert scripted.held.held == 0
        assert await method(client, "/test/Echo")(message, timeout=WAIT_S) == message


async def test_requests_that_never_end_are_bounded_too() -> None:
    async with calling() as (scripted, client):
        endless: Any = client.stream_unary("/test/Echo", None, None)
        uploads = [endless(timeout=WAIT_S) for _ in range(12)]
        for each in uploads:
            await each.write(bytes(8 << 20))
        ends = [asyncio.ensure_future(each.code()) for each in uploads]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        assert await method(client, "/test/Echo")(b"x", timeout=WAIT_S) == b"x"
        assert {each.result() for each in ends if each.done()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert 40 << 20 < scripted.held.held <= 48 << 20
        for each in uploads:
            each.cancel()

        async def nothing_held() -> bool:
            return scripted.held.held == 0

        await until_async(nothing_held)


async def test_an_answer_beyond_what_the_server_may_hold_is_refused() -> None:
    async with calling() as (scripted, client):
        assert scripted.held.take(44 << 20, large=True)
        error = await failure(method(client, "/test/Grow")(b"%d" % (8 << 20), timeout=WAIT_S))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(await method(client, "/test/Grow")(b"%d" % (3 << 20), timeout=WAIT_S)) == 3 << 20
        assert len(await method(client, "/test/Grow")(b"1000", timeout=WAIT_S)) == 1000
        assert scripted.held.held == 44 << 20


async def test_a_peer_that_reads_nothing_does_not_fill_the_memory() -> None:
    async with running() as scripted:
        _, writer = await asyncio.open_connection("127.0.0.1", scripted.port)
        writer.write(PREFACE + frame(SETTINGS, 0, 0))
        pings = frame(PING, 0, 0, bytes(8)) * 10_000
        # The server answers each ping. Once nobody reads the answers, it reads no more pings either.

        async def flood() -> None:
            while True:
                writer.write(pings)
                await writer.drain()

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(flood(), 3)
        async with channel(f"127.0.0.1:{scripted.port}") as client:
            assert await method(client, "/test/Echo")(b"x", timeout=WAIT_S) == b"x"
        writer.transport.abort()


async def test_a_body_in_tiny_frames_arrives_whole_and_takes_little_memory() -> None:
    async with running() as scripted:
        _, writer = await asyncio.open_connection("127.0.0.1", scripted.port)
        count = 30_000
        body = struct.pack(">BI", 0, 2 * count)
        writer.write(PREFACE + frame(SETTINGS, 0, 0) + request(b"/test/Wait", 1) + frame(DATA, 0, 1, body))
        writer.write(b"".join(frame(DATA, 0, 1, struct.pack(">H", number)) for number in range(count - 1)))
        writer.write(frame(DATA, 1, 1, struct.pack(">H", count - 1)))
        await scripted.all_waiting(1)
        call = scripted.waiting[0]
        assert bytes(call.message) == struct.pack(f">{count}H", *range(count))
        assert len(call.parts) < 10
        writer.close()


@pytest.mark.parametrize("first", range(5))
async def test_a_message_whose_head_arrives_in_parts_is_not_copied(first: int) -> None:
    size, count = 16 << 10, 3
    body = struct.pack(">BI", 0, size * count)
    async with running() as scripted:
        _, writer = await asyncio.open_connection("127.0.0.1", scripted.port)
        writer.write(PREFACE + frame(SETTINGS, 0, 0) + request(b"/test/Wait", 1))
        writer.write(frame(DATA, 0, 1, body[:first]) + frame(DATA, 0, 1, body[first:]))
        for number in range(count):
            writer.write(frame(DATA, number == count - 1, 1, bytes(size)))
        await scripted.all_waiting(1)
        call = scripted.waiting[0]
        assert [len(part) for part in call.parts] == [0, *[size] * count]
        writer.close()


async def test_an_upload_over_the_limit_is_refused_before_it_ends() -> None:
    async with running() as scripted:
        reader, writer = await asyncio.open_connection("127.0.0.1", scripted.port)
        writer.write(PREFACE + frame(SETTINGS, 0, 0) + request(b"/test/Wait", 1))
        refused = asyncio.create_task(read_until(reader, HEADERS))
        sent = 0
        while not refused.done():
            writer.write(frame(DATA, 0, 1, bytes(16 << 10)))
            sent += 16 << 10
            await writer.drain()
            await asyncio.sleep(0)
        await refused
        assert MAX_BYTES < sent < 2 * MAX_BYTES
        assert not scripted.waiting
        writer.close()


@pytest.mark.parametrize("end", ["finish", "abort", "respond", "leave", "disconnect"])
async def test_an_ended_call_lets_go_of_its_message_and_its_headers(end: str) -> None:
    async with calling() as (scripted, client):
        for _ in range(2):
            answer = method(client, "/test/Wait")(bytes(1 << 20), timeout=WAIT_S)
            await scripted.all_waiting(1)
            call = scripted.waiting.pop()
            assert call.size == 1 << 20
            assert call.header("content-type") == "application/grpc"
            gone = scripted.gone
            match end:
                case "finish":
                    call.finish(b"done")
                    assert await answer == b"done"
                case "abort":
                    call.abort(grpc.StatusCode.NOT_FOUND, "nothing")
                    await failure(answer)
                case "respond":
                    call.respond(404, (), b"nothing")
                    await failure(answer)
                case "leave":
                    answer.cancel()
                    await scripted.all_gone(gone + 1)
                case "disconnect":
                    for connection in list(scripted.server._connections):
                        connection.close()
                    await scripted.all_gone(gone + 1)
                    await failure(answer)
            assert call.size == 0
            assert not call.headers


async def test_a_stream_whose_answers_nobody_reads_does_not_fill_the_memory() -> None:
    path = b"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol="atserving.v1.ServingService")
    message = asked.SerializeToString()
    async with running() as scripted:
        _, writer = await asyncio.open_connection("127.0.0.1", scripted.port)
        headers = REQUEST.replace(b"\x0a/test/Wait", bytes([len(path)]) + path)
        no_window = frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0))
        writer.write(PREFACE + no_window + frame(HEADERS, 4, 1, headers))
        writer.write(frame(DATA, 0, 1, struct.pack(">BI", 0, len(message)) + message) * 5000)
        (connection,) = await connections(scripted)
        stream = next(iter(connection._streams))
        await until_async(lambda: true_if(stream.unsent > 10), what="answers wait")
        for _ in range(100):
            await asyncio.sleep(0)
        assert stream.unsent < 100
        writer.close()


@pytest.mark.parametrize("window", [0, 0x7FFFFFFF], ids=["windows closed", "socket unread"])
async def test_small_answers_that_nobody_takes_are_bounded(window: int) -> None:
    size, count, most = 50_000, 1000, 2
    async with running() as scripted:
        writers = []
        for _ in range(most):
            unread = socket.socket()
            # A system may let it grow to 32 MiB, and take most answers from the server.
            unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            unread.connect(("127.0.0.1", scripted.port))
            _, writer = await asyncio.open_connection(sock=unread, limit=1024)
            writers.append(writer)
            if window:
                cast(asyncio.Transport, writer.transport).pause_reading()
            opened = frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 0x7FFFFFFF - 65_535)) if window else b""
            writer.write(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, window)) + opened)
            for number in range(count):
                body = frame(DATA, 1, 1 + 2 * number, b"\0\0\0\0\x05%d" % size)
                writer.write(request(b"/test/Grow", 1 + 2 * number) + body)

        async def full() -> bool:
            return scripted.held.held > HELD_BYTES - 2 * size

        # Together they would be larger.
        assert most * count * size > HELD_BYTES
        await until_async(full, what="as many answers wait as there is room for")
        assert scripted.held.held <= HELD_BYTES
        for writer in writers:
            writer.transport.abort()

        async def nothing_held() -> bool:
            return scripted.held.held == 0

        await until_async(nothing_held)
        async with channel(f"127.0.0.1:{scripted.port}") as client:
            assert len(await method(client, "/test/Grow")(b"%d" % (8 << 20), timeout=WAIT_S)) == 8 << 20


async def test_an_answer_that_is_taken_late_is_held_until_then() -> None:
    async with running() as scripted:
        reader, writer = await asyncio.open_connection("127.0.0.1", scripted.port)
        writer.write(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0)))
        writer.write(request(b"/test/Grow", 1) + frame(DATA, 1, 1, b"\0\0\0\0\x045000"))

        async def held() -> bool:
            return scripted.held.held >= 5000

        await until_async(held, what="the answer waits")
        writer.write(frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 1 << 20)))
        flags, received = 0, 0
        while not flags & 1:
            head = await reader.readexactly(9)
            payload = await reader.readexactly(int.from_bytes(head[:3]))
            if head[3] in (HEADERS, DATA):
                flags = head[4]
                received += len(payload) if head[3] == DATA else 0
        assert received == 5 + 5000
        assert scripted.held.held == 0
        writer.close()


async def test_refused_uploads_break_off_no_other_call() -> None:
    """What is on the way when an upload is refused arrives after its stream has ended."""
    uploads, late_parts = range(3, 203, 2), 25
    part = bytes(16 << 10)
    async with running() as scripted:
        assert scripted.held.take(HELD_BYTES * 3 // 4 - (64 << 10), large=True)
        reader, writer = await asyncio.open_connection("127.0.0.1", scripted.port)
        writer.write(PREFACE + frame(SETTINGS, 0, 0) + request(b"/test/Wait", 1) + frame(DATA, 1, 1, bytes(5)))
        for stream in uploads:
            writer.write(request(b"/test/Echo", stream) + frame(DATA, 0, stream, part) * 5)
        await count_frames(reader, HEADERS, len(uploads))
        for stream in uploads:
            writer.write(frame(DATA, 0, stream, part) * late_parts)
            await writer.drain()
        writer.write(request(b"/test/Echo", 203) + frame(DATA, 1, 203, bytes(5)))
        await count_frames(reader, HEADERS, 2)
        scripted.waiting[0].finish(b"done")
        await count_frames(reader, HEADERS, 2)
        writer.close()
