"""Nobody outside says who they are but by their credentials, by any protocol, with credentials of others or without."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Sequence

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.api import httpbody_pb2

from atserving import transport
from atserving.v1 import authorization_pb2, edge_pb2
from reliability.frames import DATA, GOAWAY, HEADERS, RST_STREAM, field, frame, http2_start
from tests.e2e.callers import (
    API_KEY,
    AUTHORITY,
    BYTES,
    OTHERS_ACCESS_KEY,
    OTHERS_API_KEY,
    REQUEST,
    SEVEN,
    TYPED_BODY,
    TYPED_PATH,
    Answer,
    Certificate,
    Edge,
    edge_for_all,
    qiniu,
    token,
)
from tests.waiting import PATIENCE_S, until_async

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

Fields = list[tuple[str, str]]
Shown = tuple[Fields, Certificate | None]
PATH = "/v1/eval/digits"
KEY = "the key of the edge"
"""Stands for the real one, which an outsider would not have."""
_END, _BOTH_ENDS = 1, 5


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["all schemes", "no tokens"])
async def edge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Edge]:
    """Envoy's filter for tokens takes the headers away that it sets. The edge has to do without its help, too."""
    tokens = request.param == "all schemes"
    async with edge_for_all(tmp_path_factory.mktemp("callers"), tokens=tokens) as edge:
        await edge.rules(public=False, owner={"uid": 42}, group_whitelist=["vision"])
        yield edge


NOBODY: Shown = ([], None)
OTHERS = AUTHORITY.caller("7", "dogs")


def credentials(edge: Edge, path: str, host: str, content_type: str, body: bytes) -> list[Shown]:
    """Return those of the caller 7, who may not use the app, by each scheme."""
    signature = qiniu(path, host, content_type, body, access_key=OTHERS_ACCESS_KEY)
    bearer = f"Bearer {token(uid=7, groups=['dogs'])}"
    return [
        *([([("authorization", bearer)], None)] if edge.takes_tokens else []),
        ([("x-api-key", OTHERS_API_KEY)], None),
        ([("authorization", signature)], None),
        ([], OTHERS),
    ]


XFCC = 'By=spiffe://company.example/edge;Hash=00;URI="spiffe://company.example/caller/42";Subject="O=vision"'
SPOOFS: dict[str, Fields] = {
    "a uid": [("x-serving-uid", "42")],
    "groups": [("x-serving-groups", "vision")],
    "groups as a list": [("x-serving-groups", base64.b64encode(b'["vision"]').decode())],
    "with a wrong key": [("x-serving-uid", "42"), ("x-serving-edge", "none")],
    "with the right key": [("x-serving-uid", "42"), ("x-serving-groups", "vision"), ("x-serving-edge", KEY)],
    "twice": [("x-serving-uid", "42"), ("x-serving-uid", "42"), ("x-serving-edge", KEY), ("x-serving-edge", KEY)],
    "in a list": [("x-serving-uid", "7,42"), ("x-serving-uid", "42, 42")],
    "with underscores": [("x_serving_uid", "42"), ("x_serving_groups", "vision"), ("x_serving_edge", KEY)],
    "with some underscores": [("x-serving_uid", "42"), ("x_serving-groups", "vision")],
    "in bytes": [("x-serving-uid-bin", "NDI="), ("x-serving-groups-bin", "dmlzaW9u")],
    "of a proxy": [("x-forwarded-client-cert", XFCC), ("x-forwarded-for", "127.0.0.1"), ("forwarded", "for=127.0.0.1")],
    "of Envoy": [("x-envoy-internal", "true"), ("x-envoy-original-path", "/health"), ("x-envoy-peer-metadata", "42")],
    "as other headers": [("x-forwarded-uid", "42"), ("x-remote-user", "42"), ("x-original-url", "/health")],
    "an empty one first": [("x-serving-uid", ""), ("x-serving-uid", "42")],
}


def real(edge: Edge, fields: Fields) -> Fields:
    return [(name, value.replace(KEY, edge.edge_key)) for name, value in fields]


@pytest.mark.parametrize("kind", SPOOFS)
async def test_no_header_says_who_calls(edge: Edge, kind: str) -> None:
    spoof = real(edge, SPOOFS[kind])
    for fields, certificate in (NOBODY, *credentials(edge, PATH, "localhost", BYTES, SEVEN)):
        expected = 403 if fields or certificate else 401
        # Behind and before what is true.
        for sent in ([*spoof, *fields], [*fields, *spoof]):
            assert await http1(edge, lines(sent), certificate) == expected
            assert await http2(edge, sent, certificate) == expected
    for fields, certificate in (NOBODY, *credentials(edge, TYPED_PATH, edge.host, "application/grpc", TYPED_BODY)):
        expected = 403 if fields or certificate else 401
        sent = [(name, value) for name, value in [*spoof, *fields] if not name.endswith("-bin")]
        binary = [(name, base64.b64decode(value)) for name, value in spoof if name.endswith("-bin")]
        assert (await edge.grpc_with([*sent, *binary], "", certificate)).status == expected


LINES = {
    "capitals": b"X-Serving-Uid: 42\r\nX-SERVING-GROUPS: vision",
    "a space before the colon": b"x-serving-uid : 42",
    "a tab before the colon": b"x-serving-uid\t: 42",
    "a folded line": b"x-other: a\r\n x-serving-uid: 42\r\n\tx-serving-groups: vision",
    "a bare line feed": b"x-other: a\nx-serving-uid: 42",
    "a bare carriage return": b"x-other: a\rx-serving-uid: 42",
    "a zero byte": b"x-serving-uid\0: 42",
    "an escaped letter": b"x-serving%2duid: 42",
    "another hyphen": "x\u2010serving\u2010uid: 42".encode(),
    "to strip": b"connection: x-serving-edge, x-serving-uid, x-serving-groups\r\nx-serving-uid: 42",
    "to strip and close": b"connection: close, x-serving-edge\r\nproxy-connection: x-serving-edge\r\nx-serving-uid: 42",
    "to keep": b"keep-alive: x-serving-uid\r\nte: trailers, x-serving-uid\r\nx-serving-uid: 42",
    "to continue": b"expect: 100-continue\r\nx-serving-uid: 42",
    "to upgrade": b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMA\r\nx-serving-uid: 42",
    "two hosts": b"host: x-serving-uid\r\nx-serving-uid: 42",
}


REFUSED = (400, 401, 403, 421, 426)


@pytest.mark.parametrize("kind", LINES)
async def test_no_spelling_of_http_1_passes(edge: Edge, kind: str) -> None:
    for version in ("1.1", "1.0"):
        assert await http1(edge, LINES[kind], None, version=version) in (400, 401, 421, 426)
        for fields, certificate in credentials(edge, PATH, "localhost", BYTES, SEVEN):
            head = lines(fields) + b"\r\n" + LINES[kind] if fields else LINES[kind]
            assert await http1(edge, head, certificate, version=version) in REFUSED


@pytest.mark.parametrize("name", ["x-serving-uid", "X-Serving-Uid", "x_serving_uid", "x-serving-groups"])
async def test_no_trailer_says_who_calls(edge: Edge, name: str) -> None:
    value = "vision" if "groups" in name else "42"
    chunked = b"%x\r\n%s\r\n0\r\n%s: %s\r\n\r\n" % (len(SEVEN), SEVEN, name.encode(), value.encode())
    assert await http1(edge, f"transfer-encoding: chunked\r\ntrailer: {name}".encode(), None, sent=chunked) == 401
    await refused(edge, [], [(name, value), ("x-serving-edge", edge.edge_key)])


FRAMES: dict[str, Fields] = {
    "capitals": [("X-Serving-Uid", "42")],
    "a pseudo header": [(":x-serving-uid", "42")],
    "a pseudo header behind": [("x-serving-uid", "42"), (":authority", "x-serving-uid")],
    "a connection header": [("connection", "x-serving-edge"), ("x-serving-uid", "42")],
    "a protocol": [(":protocol", "x-serving-uid: 42")],
    "a line break": [("x-other", "a\r\nx-serving-uid: 42")],
    "a zero byte": [("x-serving-uid\0", "42")],
    "a space": [("x-serving-uid ", "42"), (" x-serving-uid", "42")],
}


async def test_no_spelling_of_http_2_passes(edge: Edge) -> None:
    # Envoy takes a second to close a connection with a malformed request.
    await asyncio.gather(*(refused(edge, fields, []) for fields in FRAMES.values()))


async def refused(edge: Edge, fields: Fields, trailers: Fields) -> None:
    """Assert that headers and trailers get nobody in: not at the edge by HTTP/2 or gRPC, and not at a gate."""
    others = credentials(edge, PATH, "localhost", BYTES, SEVEN)
    statuses = await asyncio.gather(
        http2(edge, fields, None, trailers=trailers),
        *(http2(edge, [*own, *fields], certificate, trailers=trailers) for own, certificate in others),
    )
    assert statuses[0] in (400, 401)
    assert all(each in (400, 403) for each in statuses[1:])
    ports = edge.mesh.ports.edge, edge.mesh.ports.gates[0]
    codes = await asyncio.gather(*(typed(edge, port, fields, trailers=trailers) for port in ports))
    assert all(each in (None, 401) for each in codes)


@pytest.mark.parametrize("query", ["x-serving-uid=42", "x_serving_uid=42&uid=42", "access_token={token}"])
async def test_no_query_says_who_calls(edge: Edge, query: str) -> None:
    path = f"{PATH}?{query.format(token=token())}"
    assert await http1(edge, b"x-other: a", None, path=path) == 401
    assert await http2(edge, [], None, path=path) == 401


@pytest.mark.parametrize("kind", SPOOFS)
async def test_a_gate_believes_only_who_knows_the_key(edge: Edge, kind: str) -> None:
    address = f"127.0.0.1:{edge.mesh.ports.gates[0]}"
    wrong = [(name, value.replace(KEY, edge.edge_key[:-1])) for name, value in SPOOFS[kind]]
    for spoof in (wrong, [*wrong, ("x-serving-edge", edge.edge_key.lower())]):
        sent: list[tuple[str, str | bytes]] = [each for each in spoof if not each[0].endswith("-bin")]
        sent += [(name, base64.b64decode(value)) for name, value in spoof if name.endswith("-bin")]
        assert (await edge.grpc_with(sent, address)).status == 401
        # Nor one who plays Envoy's transcoder, or brings credentials that only Envoy can check.
        for fields, _ in (NOBODY, *credentials(edge, TYPED_PATH, address, "application/grpc", TYPED_BODY)):
            assert (await edge.grpc_with([*sent, *fields], address)).status == 401
    body = httpbody_pb2.HttpBody(content_type=BYTES, data=SEVEN)
    request = edge_pb2.EdgeEvalRequest(app="digits", body=body).SerializeToString()
    assert await typed(
        edge,
        edge.mesh.ports.gates[0],
        wrong,
        "/atserving.v1.EdgeService/Eval",
        b"\0" + len(request).to_bytes(4) + request,
    ) in (None, 401)


async def test_a_gate_believes_who_knows_the_key(edge: Edge) -> None:
    key = edge.edge_key
    assert await edge.gate(x_serving_uid="42", x_serving_edge=key) == Answer(200)
    for wrong in ("", key[:-1], key + "x", "none"):
        assert (await edge.gate(x_serving_uid="42", x_serving_edge=wrong)).status == 401


async def test_only_envoy_may_ask_a_gate_who_a_caller_is(edge: Edge) -> None:
    http = authorization_pb2.AttributeContext.HttpRequest(method="POST", path=PATH, host="h")
    http.headers["authorization"] = qiniu(PATH, "h", "", b"").replace("Content-Type: \n", "")
    request = authorization_pb2.CheckRequest()
    request.attributes.request.http.CopyFrom(http)
    path = "/envoy.service.auth.v3.Authorization/Check"

    async def ask(address: str, *metadata: tuple[str, str]) -> grpc.StatusCode:
        async with transport.channel(address) as channel:
            try:
                check = channel.unary_unary(path, None, None)
                await check(request.SerializeToString(), metadata=metadata, timeout=30)
            except grpc.aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK

    gate = f"127.0.0.1:{edge.mesh.ports.gates[0]}"
    assert await ask(gate) is grpc.StatusCode.UNAUTHENTICATED
    assert await ask(gate, ("x-serving-edge", edge.edge_key[:-1])) is grpc.StatusCode.UNAUTHENTICATED
    assert await ask(gate, ("x-serving-edge", edge.edge_key)) is grpc.StatusCode.OK
    # Envoy shows its key with all that it passes on, and does not pass on this.
    assert await ask(edge.host) is grpc.StatusCode.UNIMPLEMENTED


def lines(fields: Fields) -> bytes:
    return "\r\n".join(f"{name}: {value}" for name, value in fields).encode()


async def connect(
    edge: Edge, certificate: Certificate | None, protocol: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if certificate is None:
        return await asyncio.open_connection("127.0.0.1", edge.mesh.ports.edge)
    tls = edge.tls(certificate)
    tls.set_alpn_protocols([protocol])
    return await asyncio.open_connection("127.0.0.1", edge.mesh.ports.edge_tls, ssl=tls, server_hostname="localhost")


async def http1(
    edge: Edge,
    head: bytes,
    certificate: Certificate | None,
    *,
    path: str = PATH,
    version: str = "1.1",
    sent: bytes = b"",
) -> int:
    """Send a request with these lines in its head, and return the status; ``sent`` is a body whose length they say."""
    reader, writer = await connect(edge, certificate, "http/1.1")
    own = f"POST {path} HTTP/{version}\r\nhost: localhost\r\ncontent-type: {BYTES}\r\nconnection: close\r\n".encode()
    length = b"" if sent else b"content-length: %d\r\n" % len(SEVEN)
    writer.write(own + length + head + b"\r\n\r\n" + (sent or SEVEN))
    try:
        async with asyncio.timeout(PATIENCE_S):
            while (status := int((await reader.readline()).split()[1])) == 100:
                await reader.readline()
            return status
    finally:
        writer.transport.abort()


def frames(path: str, content_type: str, fields: Fields, body: bytes, trailers: Fields, scheme: str = "http") -> bytes:
    known = {
        ":method": "POST",
        ":scheme": scheme,
        ":path": path,
        ":authority": "localhost",
        "content-type": content_type,
    }
    head = b"".join(
        field(name.encode(), value.encode()) for name, value in [*known.items(), ("te", "trailers"), *fields]
    )
    said = http2_start() + frame(HEADERS, 4, 1, head) + frame(DATA, 0 if trailers else _END, 1, body)
    if trailers:
        last = b"".join(field(name.encode(), value.encode()) for name, value in trailers)
        said += frame(HEADERS, _BOTH_ENDS, 1, last)
    return said


async def http2(
    edge: Edge,
    fields: Fields,
    certificate: Certificate | None,
    *,
    path: str = PATH,
    trailers: Sequence[tuple[str, str]] = (),
) -> int:
    """Send a request with these headers, and return the status; 400 if there is no answer but a reset."""
    reader, writer = await connect(edge, certificate, "h2")
    writer.write(frames(path, BYTES, fields, SEVEN, list(trailers), "https" if certificate else "http"))
    body = b""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                head = await reader.readexactly(9)
                payload = await reader.readexactly(int.from_bytes(head[:3]))
                if head[3] in (RST_STREAM, GOAWAY):
                    return 400
                if head[3] == DATA:
                    body += payload
                if head[3] in (DATA, HEADERS) and head[4] & _END:
                    return int(json.loads(body)["code"]) or 200
    except (asyncio.IncompleteReadError, ConnectionError):
        return 400
    finally:
        writer.transport.abort()


_number = 0


async def typed(
    edge: Edge,
    port: int,
    fields: Fields,
    path: str = TYPED_PATH,
    body: bytes = TYPED_BODY,
    trailers: Sequence[tuple[str, str]] = (),
) -> int | None:
    """Send a call of gRPC to a port, and return the code by the gate's log; None if no gate has seen it."""
    global _number
    _number += 1
    reqid = f"spoofed-{_number}-of-the-test"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(frames(path, "application/grpc", [("x-reqid", reqid), *fields], body, list(trailers)))
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                head = await reader.readexactly(9)
                await reader.readexactly(int.from_bytes(head[:3]))
                if head[3] in (RST_STREAM, GOAWAY):
                    return None
                if head[3] in (DATA, HEADERS) and head[4] & _END:
                    break
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    finally:
        writer.transport.abort()

    async def code() -> list[int]:
        logged = [json.loads(line) for line in edge.mesh.log("gate").splitlines() if f'"{reqid}"' in line]
        return [each["code"] for each in logged]

    await until_async(code)
    return (await code())[0] or 200


async def test_the_attempts_are_heard(edge: Edge) -> None:
    """The callers of this file get through where they may, so their other attempts do fail for what they claim."""
    assert REQUEST.app == "digits"
    mine = [("x-api-key", API_KEY)]
    assert await http1(edge, lines(mine), None) == 200
    assert await http2(edge, mine, None) == 200
    assert await http2(edge, [], AUTHORITY.caller("42")) == 200
    assert await http1(edge, b"x-other: a", AUTHORITY.caller("42")) == 200
    assert await typed(edge, edge.mesh.ports.edge, mine) == 200
    assert await typed(edge, edge.mesh.ports.edge, []) == 401
    known = [("x-serving-uid", "42"), ("x-serving-edge", edge.edge_key)]
    assert await typed(edge, edge.mesh.ports.gates[0], known) == 200
