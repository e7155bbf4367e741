"""The gRPC server over our HTTP/2, called by the clients of grpcio and by raw HTTP/2 frames over real sockets."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from atserving.errors import StartError
from atserving.grpc_call import Call
from atserving.grpc_server import Server
from atserving.held import HeldBytes
from atserving.transport import LIVE, channel
from atserving.v1 import edge_pb2, serving_pb2
from reliability.frames import DATA, GOAWAY, HEADERS, PING, PREFACE, RST_STREAM, SETTINGS, WINDOW_UPDATE, field, frame
from tests.waiting import until_async

MAX_BYTES = 12 << 20
HELD_BYTES = 64 << 20
WAIT_S = 20.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

REQUEST = b"".join(
    field(name, value)
    for name, value in {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": b"/test/Wait",
        b":authority": b"test",
        b"content-type": b"application/grpc",
    }.items()
)


class Scripted:
    """Answers calls by their path."""

    def __init__(self) -> None:
        self.waiting: list[Call] = []
        self.gone = 0
        self.port = 0
        self.held = HeldBytes(HELD_BYTES)
        services = [serving_pb2.DESCRIPTOR.services_by_name["ServingService"]]
        self.server = Server(services, MAX_BYTES, self.held)
        self.server.unary("/test/Echo", lambda call: call.finish(call.message, headers=[("x-said", "yes")]))
        self.server.unary("/test/Grow", lambda call: call.finish(bytes(int(bytes(call.message)))))
        self.server.unary("/test/Fail", self._fail)
        self.server.unary("/test/Wait", self._wait)
        self.server.unary("/test/Raise", self._raise)

    @staticmethod
    def _fail(call: Call) -> None:
        deadline = call.deadline()
        call.abort(grpc.StatusCode.NOT_FOUND, f"«{call.header('x-what')}» 100 %\n", [("x-code", str(deadline is None))])

    @staticmethod
    def _raise(call: Call) -> None:
        raise RuntimeError("a bug")

    def _wait(self, call: Call) -> None:
        self.waiting.append(call)
        call.on_gone = self._left

    def _left(self) -> None:
        self.gone += 1

    async def all_waiting(self, count: int) -> None:
        async def reached() -> bool:
            return len(self.waiting) >= count

        await until_async(reached, what=f"{count} calls wait")

    async def all_gone(self, count: int) -> None:
        async def reached() -> bool:
            return self.gone >= count

        await until_async(reached, what=f"{count} calls are gone")


@asynccontextmanager
async def running() -> AsyncIterator[Scripted]:
    scripted = Scripted()
    scripted.port = await scripted.server.start("127.0.0.1:0")
    try:
        yield scripted
    finally:
        await scripted.server.stop(0)


@asynccontextmanager
async def calling() -> AsyncIterator[tuple[Scripted, grpc.aio.Channel]]:
    async with running() as scripted, channel(f"127.0.0.1:{scripted.port}") as client:
        yield scripted, client


def method(client: grpc.aio.Channel, path: str) -> Any:
    """Return a method whose messages are bytes."""
    return client.unary_unary(path, None, None)


async def failure(call: Awaitable[object]) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


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


@pytest.mark.parametrize("size", [0, 1, 16_384, 1_000_000, MAX_BYTES])
async def test_a_message_of_any_size_arrives_and_returns(size: int) -> None:
    async with calling() as (_, client):
        sent = bytes(range(256)) * (size // 256) + bytes(size % 256)
        call = method(client, "/test/Echo")(sent, timeout=WAIT_S)
        assert await call == sent
        assert dict(await call.initial_metadata())["x-said"] == "yes"


async def test_many_calls_of_one_connection_are_not_mixed_up() -> None:
    async with calling() as (_, client):
        sent = [str(number).encode() * (number * 37 % 5000) for number in range(3000)]
        echo = method(client, "/test/Echo")
        assert await asyncio.gather(*(echo(each, timeout=WAIT_S) for each in sent)) == sent


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_a_compressed_message_is_rejected_before_it_is_unpacked(compression: grpc.Compression) -> None:
    async with calling() as (_, client):
        error = await failure(method(client, "/test/Echo")(b"a" * 1000, compression=compression))
        assert error.code() == grpc.StatusCode.UNIMPLEMENTED
        assert "compressed" in error.details()
        # A client that may compress, but did not, is not affected.
        assert await method(client, "/test/Echo")(b"", compression=compression, timeout=WAIT_S) == b""


async def test_a_message_over_the_limit_is_rejected() -> None:
    async with calling() as (_, client):
        error = await failure(method(client, "/test/Echo")(bytes(MAX_BYTES + 1), timeout=WAIT_S))
        assert (error.code(), error.details()) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"the message is larger than {MAX_BYTES} bytes",
        )


@pytest.mark.parametrize(("attempt", "proceeds"), [("1", False), ("2", True), ("5", True)])
async def test_the_answer_to_a_retried_request_begins_before_the_request_is_handled(
    attempt: str, proceeds: bool
) -> None:
    """Envoy then retries it no more, even if this process dies in the handler."""
    async with running() as scripted:
        headers = REQUEST + field(b"x-envoy-attempt-count", attempt.encode())
        reader, writer = await asyncio.open_connection("127.0.0.1", scripted.port)
        writer.write(PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 4, 1, headers))
        writer.write(frame(DATA, 1, 1, b"\0\0\0\0\0"))
        await scripted.all_waiting(1)
        scripted.waiting[0].finish(b"")
        blocks = [block async for block in header_blocks(reader)]
        assert (blocks[0] == b"\x08\x03100") is proceeds
        assert len(blocks) == 2 + proceeds
        writer.close()


async def header_blocks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield the header blocks of a response up to its trailers."""
    flags = 0
    while not flags & 1:
        head = await reader.readexactly(9)
        payload = await reader.readexactly(int.from_bytes(head[:3]))
        if head[3] == HEADERS:
            flags = head[4]
            yield payload


async def test_a_failure_has_its_status_message_and_metadata() -> None:
    async with calling() as (_, client):
        error = await failure(method(client, "/test/Fail")(b"", metadata=(("x-what", "it"),)))
        assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "«it» 100 %\n")
        assert dict(error.trailing_metadata())["x-code"] == "True"
        error = await failure(method(client, "/test/Fail")(b"", timeout=WAIT_S))
        assert dict(error.trailing_metadata())["x-code"] == "False"


async def test_a_bug_in_a_handler_fails_its_call_alone() -> None:
    async with calling() as (scripted, client):
        waiting = method(client, "/test/Wait")(b"", timeout=WAIT_S)
        await scripted.all_waiting(1)
        assert (await failure(method(client, "/test/Raise")(b""))).code() == grpc.StatusCode.INTERNAL
        scripted.waiting[0].finish(b"fine")
        assert await waiting == b"fine"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_a_server_of_all_addresses_takes_ipv4_and_ipv6(address: str) -> None:
    server = Server([])
    port = await server.start("[::]:0")
    try:
        async with channel(f"[{address}]:{port}" if ":" in address else f"{address}:{port}") as client:
            health = health_pb2_grpc.HealthStub(client)
            assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)).status == NOT_SERVING
    finally:
        await server.stop(0)


async def test_an_unknown_method_is_unimplemented() -> None:
    async with calling() as (_, client):
        assert (await failure(method(client, "/test/None")(b"x"))).code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_caller_who_leaves_is_noticed() -> None:
    async with calling() as (scripted, client):
        call = method(client, "/test/Wait")(b"")
        await scripted.all_waiting(1)
        call.cancel()
        await scripted.all_gone(1)
        # An answer to nobody harms nobody.
        scripted.waiting[0].finish(b"late")
        assert await method(client, "/test/Echo")(b"next") == b"next"


async def test_a_caller_who_reads_slowly_delays_no_other() -> None:
    async with running() as scripted:
        reader, writer = await asyncio.open_connection("127.0.0.1", scripted.port)
        request = REQUEST.replace(b"\x0a/test/Wait", b"\x0a/test/Grow")
        body = b"\0\0\0\0\x0810000000"
        writer.write(PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 4, 1, request) + frame(DATA, 1, 1, body))
        await reader.readexactly(1)
        async with channel(f"127.0.0.1:{scripted.port}") as client:
            assert await method(client, "/test/Echo")(b"x", timeout=WAIT_S) == b"x"
        writer.close()


async def test_a_stopping_server_finishes_its_calls_and_takes_no_more() -> None:
    async with calling() as (scripted, client):
        call = method(client, "/test/Wait")(b"", timeout=WAIT_S)
        await scripted.all_waiting(1)
        stopping = asyncio.create_task(scripted.server.stop(WAIT_S))

        async def refused() -> bool:
            # The server takes what the client had sent before it knew.
            try:
                await method(client, "/test/Echo")(b"", timeout=WAIT_S)
            except grpc.aio.AioRpcError as error:
                return error.code() == grpc.StatusCode.UNAVAILABLE
            return False

        await until_async(refused, what="new calls are refused")
        assert not stopping.done()
        scripted.waiting[0].finish(b"done")
        assert await call == b"done"
        await stopping


async def test_a_server_cancels_what_does_not_finish_within_its_grace() -> None:
    async with calling() as (scripted, client):
        call = method(client, "/test/Wait")(b"", timeout=WAIT_S)
        await scripted.all_waiting(1)
        await scripted.server.stop(0.1)
        assert (await failure(call)).code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
        assert scripted.gone == 1


async def test_health_is_checked_and_watched() -> None:
    async with calling() as (scripted, client):
        health = health_pb2_grpc.HealthStub(client)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="atserving.v1.ServingService"))
        assert (await watch.read()).status == NOT_SERVING
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
        assert (await health.Check(health_pb2.HealthCheckRequest(service=LIVE))).status == SERVING
        await scripted.server.set_serving(True)
        assert (await watch.read()).status == SERVING
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
        unknown = await failure(health.Check(health_pb2.HealthCheckRequest(service="other")))
        assert unknown.code() == grpc.StatusCode.NOT_FOUND
        watch.cancel()


async def test_reflection_lists_the_services() -> None:
    async with calling() as (_, client):
        stub = reflection_pb2_grpc.ServerReflectionStub(client)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        response = await call.read()
        names = {each.name for each in response.list_services_response.service}
        assert {"atserving.v1.ServingService", "grpc.health.v1.Health"} <= names


async def test_reflection_leaves_out_internal_services_and_files_of_others() -> None:
    services = [serving_pb2.DESCRIPTOR.services_by_name["ServingService"]]
    server = Server(services, internal=[edge_pb2.DESCRIPTOR.services_by_name["EdgeService"]])
    port = await server.start("127.0.0.1:0")
    try:
        async with channel(f"127.0.0.1:{port}") as client:
            ask = reflection_pb2.ServerReflectionRequest
            asked = [
                ask(list_services=""),
                ask(file_containing_symbol="atserving.v1.ServingService"),
                ask(file_containing_symbol="atserving.v1.EdgeService"),
                ask(file_by_filename="atserving/v1/edge.proto"),
            ]
            call = reflection_pb2_grpc.ServerReflectionStub(client).ServerReflectionInfo(iter(asked))
            listed, found, *hidden = [each async for each in call]
            names = [each.name for each in listed.list_services_response.service]
            assert [each for each in names if each.startswith("atserving.")] == ["atserving.v1.ServingService"]
            assert found.file_descriptor_response.file_descriptor_proto
            assert all(each.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0] for each in hidden)
            # The health of an internal service is known all the same.
            health = health_pb2_grpc.HealthStub(client)
            assert (await health.Check(health_pb2.HealthCheckRequest(service="atserving.v1.EdgeService"))).status
    finally:
        await server.stop(0)


async def test_an_address_in_use_is_a_start_error() -> None:
    async with running() as scripted:
        other = Server([])
        with pytest.raises(StartError, match="the address is in use"):
            await other.start(f"127.0.0.1:{scripted.port}")


async def conversation(port: int, *frames: bytes) -> bytes:
    """Send raw frames after the preface, and return everything until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(PREFACE + frame(SETTINGS, 0, 0) + b"".join(frames))
    said = b""
    # Closing a connection with unread data resets it.
    with suppress(ConnectionResetError):
        async with asyncio.timeout(WAIT_S):
            while more := await reader.read(1 << 16):
                said += more
    writer.close()
    return said


@pytest.mark.parametrize(
    "rubbish",
    [
        frame(DATA, 1, 1, b"for a stream that was never opened"),
        frame(SETTINGS, 0, 0, b"12345"),
        frame(HEADERS, 5, 1, b"\xff" * 40),
        frame(HEADERS, 5, 2, REQUEST),
        b"\xff\xff\xff" + bytes((DATA, 0)) + bytes(4),
    ],
)
async def test_a_peer_that_breaks_the_protocol_is_disconnected(rubbish: bytes) -> None:
    async with running() as scripted:
        assert bytes((GOAWAY, 0)) in await conversation(scripted.port, rubbish)
        async with channel(f"127.0.0.1:{scripted.port}") as client:
            assert await method(client, "/test/Echo")(b"x", timeout=WAIT_S) == b"x"


async def test_a_request_that_is_wrong_alone_ends_alone() -> None:
    async with running() as scripted:
        reader, writer = await asyncio.open_connection("127.0.0.1", scripted.port)
        good = frame(HEADERS, 4, 3, REQUEST) + frame(DATA, 1, 3, bytes(5))
        # The first request's content-length is not that of its body.
        bad = frame(HEADERS, 4, 1, REQUEST + field(b"content-length", b"7")) + frame(DATA, 1, 1, bytes(5))
        writer.write(PREFACE + frame(SETTINGS, 0, 0) + bad + good)
        await scripted.all_waiting(1)
        scripted.waiting[0].finish(b"for the second")
        async with asyncio.timeout(WAIT_S):
            said = await reader.readuntil(b"for the second")
        assert frame(RST_STREAM, 0, 1, struct.pack(">I", 1)) in said
        writer.close()


async def test_a_peer_that_leaves_gets_its_answers_first() -> None:
    async with running() as scripted:
        reader, writer = await asyncio.open_connection("127.0.0.1", scripted.port)
        request = frame(HEADERS, 4, 1, REQUEST) + frame(DATA, 1, 1, bytes(5))
        writer.write(PREFACE + frame(SETTINGS, 0, 0) + request + frame(GOAWAY, 0, 0, bytes(8)))
        await scripted.all_waiting(1)
        scripted.waiting[0].finish(b"answer")
        writer.write(frame(PING, 0, 0, bytes(8)))
        async with asyncio.timeout(WAIT_S):
            assert b"answer" in await reader.read(-1)
        writer.close()


async def test_bytes_that_are_not_http_2_end_the_connection() -> None:
    async with running() as scripted:
        reader, writer = await asyncio.open_connection("127.0.0.1", scripted.port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        async with asyncio.timeout(WAIT_S):
            await reader.read(-1)
        writer.close()


async def test_headers_over_the_limit_do_not_reach_a_handler() -> None:
    async with calling() as (scripted, client):
        large = tuple((f"x-{number}", "v" * 1000) for number in range(200))
        await failure(method(client, "/test/Wait")(b"", metadata=large, timeout=WAIT_S))
        assert not scripted.waiting
        assert await method(client, "/test/Echo")(b"x", timeout=WAIT_S) == b"x"


async def test_a_peer_that_resets_most_of_its_requests_is_disconnected() -> None:
    """As in the attack called Rapid Reset."""
    async with running() as scripted:
        requests = [
            frame(HEADERS, 4, stream, REQUEST)
            + frame(DATA, 1, stream, bytes(5))
            + frame(RST_STREAM, 0, stream, b"\0\0\0\x08")
            for stream in range(1, 8001, 2)
        ]
        await conversation(scripted.port, *requests)
        assert scripted.gone == len(scripted.waiting) < 4000


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


async def test_a_long_message_of_an_error_is_cut() -> None:
    async with calling() as (_, client):
        failed = await failure(method(client, "/test/Fail")(b"", metadata=(("x-what", "v" * 20_000),), timeout=WAIT_S))
        assert failed.code() is grpc.StatusCode.NOT_FOUND
        assert 1000 < len(failed.details()) <= 1024


def request(path: bytes, stream: int, end: bool = False) -> bytes:
    """Return the HEADERS of a request for a path as long as ``/test/Wait``."""
    return frame(HEADERS, 5 if end else 4, stream, REQUEST.replace(b"/test/Wait", path))


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


async def read_until(reader: asyncio.StreamReader, kind: int) -> None:
    """Read frames until one of a kind has come."""
    while True:
        head = await reader.readexactly(9)
        await reader.readexactly(int.from_bytes(head[:3], "big"))
        if head[3] == kind:
            return


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


async def test_an_answered_call_lets_go_of_its_message() -> None:
    async with calling() as (scripted, client):
        for leave in (False, True):
            answer = method(client, "/test/Wait")(bytes(1 << 20), timeout=WAIT_S)
            await scripted.all_waiting(1)
            call = scripted.waiting.pop()
            assert call.size == 1 << 20
            if leave:
                answer.cancel()
                await scripted.all_gone(1)
            else:
                call.finish(b"done")
                assert await answer == b"done"
            assert call.size == 0


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


async def connections(scripted: Scripted) -> list[Any]:
    """Return the server's connections, once one has a stream."""

    async def found() -> bool:
        return any(each._streams for each in scripted.server._connections)

    await until_async(found, what="a stream is open")
    return list(scripted.server._connections)


async def true_if(value: bool) -> bool:
    return value


async def test_a_stop_waits_for_calls_but_not_for_those_who_only_listen() -> None:
    async with running() as scripted, channel(f"127.0.0.1:{scripted.port}") as client:
        silent = await asyncio.open_connection("127.0.0.1", scripted.port)
        idle = await asyncio.open_connection("127.0.0.1", scripted.port)
        idle[1].write(PREFACE + frame(SETTINGS, 0, 0))
        watching = health_pb2_grpc.HealthStub(client).Watch(health_pb2.HealthCheckRequest())
        assert (await watching.read()).status == NOT_SERVING
        listing = reflection_pb2_grpc.ServerReflectionStub(client).ServerReflectionInfo()
        await listing.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        await listing.read()
        call = method(client, "/test/Wait")(b"", timeout=WAIT_S)
        await scripted.all_waiting(1)
        stopping = asyncio.create_task(scripted.server.stop(WAIT_S))
        for reader, _ in (silent, idle):
            await asyncio.wait_for(reader.read(), WAIT_S / 2)
        assert (await failure(listing.read())).code() is grpc.StatusCode.UNAVAILABLE
        assert not stopping.done()
        scripted.waiting[0].finish(b"done")
        assert await call == b"done"
        await asyncio.wait_for(stopping, WAIT_S / 2)


async def test_those_who_leave_at_once_leave_no_error_behind(caplog: pytest.LogCaptureFixture) -> None:
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    async with running() as scripted:
        watch = bytes([len(b"/grpc.health.v1.Health/Watch")]) + b"/grpc.health.v1.Health/Watch"
        for number in range(100):
            _, writer = await asyncio.open_connection("127.0.0.1", scripted.port)
            headers = REQUEST.replace(b"\x0a/test/Wait", watch)
            writer.write(PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 4, 1, headers))
            writer.write(frame(DATA, 1, 1, b"\0\0\0\0\0"))
            if number % 2:
                await writer.drain()
                await asyncio.sleep(0)
            writer.transport.abort()
        await scripted.server.set_serving(True)

        async def left() -> bool:
            return not scripted.server._connections

        await until_async(left, what="all connections have ended")
    assert not errors


@pytest.mark.parametrize("seed", range(4))
async def test_random_frames_harm_no_other_connection(seed: int) -> None:
    draw = random.Random(seed)
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))

    def any_frame(stream: int) -> bytes:
        at = draw.choice([stream, stream, stream, max(stream - 2, 1), 0, stream + 2, 2])
        number = struct.pack(">I", draw.choice([0, 1, 1000, 0x7FFFFFFF, 0x80000001]))
        setting = struct.pack(">HI", draw.choice([1, 2, 3, 4, 5, 6, 9]), draw.choice([0, 1, 16384, 65535, 1 << 31]))
        junk = draw.randbytes(draw.randrange(40))
        return draw.choice(
            [
                request(draw.choice([b"/test/Wait", b"/test/Echo"]), stream, draw.random() < 0.3),
                frame(HEADERS, draw.choice([0, 1, 4, 5, 12, 36]), stream, draw.choice([REQUEST, junk, REQUEST[:20]])),
                frame(DATA, draw.choice([0, 1, 8]), at, draw.choice([b"", b"\0\0\0\0\3abc", b"\0\xff\xff\xff", junk])),
                frame(RST_STREAM, 0, at, number),
                frame(8, 0, at, number),
                frame(SETTINGS, draw.choice([0, 1]), draw.choice([0, 0, 1]), draw.choice([setting, b"", junk])),
                frame(PING, draw.choice([0, 1]), 0, bytes(draw.choice([8, 8, 7]))),
                frame(GOAWAY, 0, 0, bytes(8)),
                frame(draw.randrange(256), draw.randrange(256), at, junk),
                junk,
            ]
        )

    async def attack(port: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        frames = [any_frame(1 + 2 * (number // 2)) for number in range(draw.randrange(1, 60))]
        writer.write(PREFACE + frame(SETTINGS, 0, 0) + b"".join(frames))
        with suppress(OSError):
            await writer.drain()
        writer.transport.abort()

    async with calling() as (scripted, client):
        for _ in range(25):
            await asyncio.gather(*(attack(scripted.port) for _ in range(8)))
            assert await method(client, "/test/Echo")(b"well", timeout=WAIT_S) == b"well"
            for call in scripted.waiting:
                call.finish(b"late")
            scripted.waiting.clear()
    assert not errors


@pytest.mark.parametrize("window", [0, 0x7FFFFFFF], ids=["windows closed", "socket unread"])
async def test_small_answers_that_nobody_takes_are_bounded(window: int) -> None:
    size, count, most = 50_000, 1000, 2
    async with running() as scripted:
        writers = []
        for _ in range(most):
            _, writer = await asyncio.open_connection("127.0.0.1", scripted.port, limit=1024)
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


async def count_frames(reader: asyncio.StreamReader, kind: int, count: int) -> None:
    for _ in range(count):
        await read_until(reader, kind)
