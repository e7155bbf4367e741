"""Envoy answers odd requests itself, in the words of every error, and no gate suffers from them."""

from __future__ import annotations

import asyncio
import gzip
import re

import grpc.aio
import orjson
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from atserving import transport
from reliability.frames import DATA, HEADERS, frame, http2_headers, http2_start
from tests.envoy.fake_gate import NEVER
from tests.envoy.rig import EVAL, TYPED_EVAL, Edge, eval_request
from tests.waiting import PATIENCE_S, until_async

pytestmark = pytest.mark.asyncio(loop_scope="module")

HEALTH = "/grpc.health.v1.Health/Check"
OCTETS = "content-type: application/octet-stream"


def check(answer: bytes, status: int, message: str, *lines: str) -> None:
    """Check a raw HTTP/1 error: its status, more header lines, and the body of every error."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.[01] (\d+) ", head), answer
    assert int(head.split()[1]) == status
    assert orjson.loads(body) == {"code": status, "message": message}
    for line in ("content-type: application/json", "x-reqid: ", *lines):
        assert f"\r\n{line}".encode() in head


def variant(old: str, new: str) -> bytes:
    """Return an eval with another text in its head."""
    head, end, body = eval_request().partition(b"\r\n\r\n")
    changed = head.replace(old.encode("latin-1"), new.encode("latin-1"))
    assert changed != head
    return changed + end + body


@pytest.mark.parametrize(
    "request_",
    [
        eval_request(b"x", "host: y"),
        variant("host: localhost", "host: localhost\0y"),
        variant("HTTP/1.1", ""),
        variant(" HTTP/1.1", ""),
        variant("HTTP/1.1", "HTTP/x"),
        variant("HTTP/1.1", "HTTP/11.1"),
        variant("HTTP/1.1\r\nhost: localhost", "HTTP/1.0"),
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nhost: y\r\nconnection: close\r\n\r\n",
    ],
)
async def test_a_malformed_request_is_a_400(edge: Edge, request_: bytes) -> None:
    check(await edge.raw(request_), 400, "malformed HTTP request")


async def test_http_1_0_with_a_host_is_served(edge: Edge) -> None:
    assert b" 200 OK" in await edge.raw(eval_request(version="1.0"))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        # No registry runs here.
        *[(host, 503) for host in ("localhost", "LOCALHOST:9903", "127.0.0.1:9903", "10.1.2.3", "[::1]:9903", "[::1]")],
        *[(host, 421) for host in ("attacker.test", "attacker.test:9903", "127.0.0.1.attacker.test", "localhost.test")],
        *[(host, 421) for host in ("", "xlocalhost", "127.0.0.1:9903.test")],
    ],
)
async def test_the_api_for_operators_does_not_answer_to_the_name_of_a_web_page(
    edge: Edge, host: str, status: int
) -> None:
    request = f"GET /v1/apps HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.ports.operators)
    writer.write(request.encode())
    async with asyncio.timeout(PATIENCE_S):
        answer = await reader.read()
    writer.close()
    assert int(answer.split()[1]) == status
    assert orjson.loads(answer.partition(b"\r\n\r\n")[2])["code"] == status


@pytest.mark.parametrize(
    "content_type", ["application/octet\xff-stream", "\xff", "application/grpc-web", "application/grpc-web+proto"]
)
async def test_a_content_type_that_is_none_is_a_415(edge: Edge, content_type: str) -> None:
    answer = await edge.raw(variant(OCTETS, f"content-type: {content_type}"))
    check(answer, 415, "content type should be application/json or application/octet-stream")


async def test_an_error_of_a_grpc_web_caller_has_the_body_of_every_error(edge: Edge) -> None:
    request = variant(OCTETS, "content-type: application/grpc-web").replace(EVAL.encode(), b"/nothing")
    check(await edge.raw(request), 404, "unknown path")


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip"])
async def test_an_encoded_body_is_a_415(edge: Edge, encoding: str) -> None:
    request = eval_request(gzip.compress(b"x"), f"content-encoding: {encoding}")
    check(
        await edge.raw(request), 415, "the body has a content-encoding; send it as it is", "accept-encoding: identity"
    )
    assert b" 200 OK" in await edge.raw(eval_request(b"x", "content-encoding: Identity"))


async def test_a_connect_is_a_405(edge: Edge) -> None:
    # It asks for a tunnel, so it has no end.
    answer = await edge.raw(b"CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n")
    check(answer, 405, "this server is no proxy", "allow: GET, POST")


@pytest.mark.parametrize("path", [HEALTH, TYPED_EVAL, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"])
async def test_a_grpc_path_accepts_only_post(edge: Edge, path: str) -> None:
    get = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    check(await edge.raw(f"{get}\r\n".encode()), 405, "this path accepts only POST", "allow: POST")
    # A caller that says it is gRPC gets a gRPC status.
    answer = await edge.raw(f"{get}content-type: application/grpc\r\n\r\n".encode())
    assert b"\r\ngrpc-status: 12\r\n" in answer
    assert b"\r\ngrpc-message: this path accepts only POST\r\n" in answer


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_odd_grpc_requests_eject_no_gate(edge: Edge, method: str) -> None:
    headers = http2_headers(HEALTH, "application/grpc", method)
    for _ in range(10):
        reader, writer = await edge.connect()
        writer.write(http2_start() + frame(HEADERS, 4, 1, headers) + frame(DATA, 1, 1, b"\0\0\0\0\0"))
        async with asyncio.timeout(PATIENCE_S):
            while (head := await reader.readexactly(9))[3] != HEADERS:
                await reader.readexactly(int.from_bytes(head[:3]))
        writer.close()
    assert await edge.stat("cluster.gate.outlier_detection.ejections_enforced_total") == 0
    assert await edge.stat("cluster.gate.outlier_detection.ejections_detected_consecutive_local_origin_failure") == 0


async def test_callers_may_check_health_but_not_watch_it(edge: Edge) -> None:
    async with transport.channel(f"127.0.0.1:{edge.ports.edge}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Watch(health_pb2.HealthCheckRequest()).read()
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNIMPLEMENTED, "unknown path")


async def test_a_call_over_the_limit_is_resource_exhausted(edge: Edge) -> None:
    async with transport.channel(f"127.0.0.1:{edge.ports.edge}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(TYPED_EVAL, None, None)(bytes(22 << 20))
    expected = (grpc.StatusCode.RESOURCE_EXHAUSTED, "the request's body is larger than 20 MiB")
    assert (caught.value.code(), caught.value.details()) == expected


async def test_a_connection_may_have_100_requests_in_flight(edge: Edge) -> None:
    async with transport.channel(f"127.0.0.1:{edge.ports.edge}") as channel:
        call = channel.unary_unary(TYPED_EVAL, None, None)
        active = "http.edge.downstream_rq_active"
        waiting = [asyncio.ensure_future(call(NEVER)) for _ in range(120)]

        async def full() -> bool:
            return await edge.stat(active) == 100

        await until_async(full, what="100 requests are in flight")
        # The client holds back the others, and other connections have their own.
        assert (await edge.ask())[0] == 200
        assert await edge.stat(active) == 100
        for each in waiting:
            each.cancel()


async def test_a_lost_call_says_so_in_our_words(edge: Edge) -> None:
    async with transport.channel(f"127.0.0.1:{edge.ports.edge}") as channel:
        call = channel.unary_unary(TYPED_EVAL, None, None)(NEVER)
        waiting = asyncio.ensure_future(call)

        async def asked() -> bool:
            return await edge.stat("cluster.gate.upstream_rq_active") == 1

        await until_async(asked, what="a gate has the call")
        for gate in edge.gates:
            gate.kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await waiting
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() in ("no gate is ready", "the gates broke off while they had this request")
