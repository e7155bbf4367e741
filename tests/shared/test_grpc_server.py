"""The gRPC server over our HTTP/2, called by the clients of grpcio and by raw HTTP/2 frames over real sockets."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from atserving.errors import StartError
from atserving.grpc_server import Server
from atserving.transport import LIVE, channel
from atserving.v1 import edge_pb2, serving_pb2
from reliability.frames import DATA, GOAWAY, HEADERS, PING, PREFACE, RST_STREAM, SETTINGS, field, frame
from tests.shared.scripted_server import (
    MAX_BYTES,
    NOT_SERVING,
    REQUEST,
    SERVING,
    WAIT_S,
    calling,
    conversation,
    failure,
    header_blocks,
    method,
    request,
    running,
)
from tests.waiting import until_async


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
    port = await server.start("[::]:0", insecure=True)
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
    """As in the attack called Rapid Reset. On a busy machine the requests take several seconds."""
    async with running() as scripted:
        requests = [
            frame(HEADERS, 4, stream, REQUEST)
            + frame(DATA, 1, stream, bytes(5))
            + frame(RST_STREAM, 0, stream, b"\0\0\0\x08")
            for stream in range(1, 32001, 2)
        ]
        await conversation(scripted.port, *requests)
        assert scripted.gone == len(scripted.waiting) < 16000


async def test_a_long_message_of_an_error_is_cut() -> None:
    async with calling() as (_, client):
        failed = await failure(method(client, "/test/Fail")(b"", metadata=(("x-what", "v" * 20_000),), timeout=WAIT_S))
        assert failed.code() is grpc.StatusCode.NOT_FOUND
        assert 1000 < len(failed.details()) <= 1024


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
