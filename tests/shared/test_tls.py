"""Mutual TLS of a server: who gets in, why others do not, wrong files, and new files."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from atserving import tls_server, transport
from atserving.errors import StartError
from atserving.grpc_server import Server
from atserving.local.authority import Authority
from atserving.tls import ENVOY, EVALUATOR, GATE, OPERATOR, REGISTRY, Tls, TlsFiles
from tests.waiting import PATIENCE_S, until_async

EXPIRED = timedelta(days=-1)
OTHER_METHOD = "/atserving.v1.ServingService/Eval"
LINK = b"ATSL\x02"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "stranger")


@asynccontextmanager
async def serving(tls: Tls | None, *peers: str) -> AsyncIterator[str]:
    """Run a server that only these peers may call; yield its address."""
    server = Server([], peers=peers or None)
    port = await server.start("127.0.0.1:0", tls=tls)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def status(address: str, tls: Tls | None, role: str = REGISTRY, method: str = "") -> grpc.StatusCode:
    """Return how a call ends: of the health service, or of another method."""
    async with transport.channel(address, tls=tls, role=role) as channel:
        try:
            if method:
                await channel.unary_unary(method, bytes, bytes)(b"", timeout=PATIENCE_S)
            else:
                request = health_pb2.HealthCheckRequest(service=transport.LIVE)
                await health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE_S)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK


async def raw(address: str, context: ssl.SSLContext | None = None, sent: bytes = b"") -> None:
    """Connect, send some bytes, and wait for the end of the connection."""
    host, _, port = address.rpartition(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname=context and "")
        writer.write(sent)
        await reader.read()
        writer.close()
    except OSError:
        pass


def client_context(ca: Path, files: TlsFiles | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca)
    context.check_hostname = False
    if files:
        context.load_cert_chain(files.cert, files.key)
    return context


async def refusal(work: Callable[[], Any], wanted: str) -> Mapping[str, Any]:
    """Do something until the log has a refusal for the wanted reason; return its line. The log leaves some out."""
    with capture_logs() as lines:

        async def logged() -> bool:
            await work()
            return any(wanted in line.get("reason", "") for line in lines)

        await until_async(logged, what=f"{wanted!r} is logged")
    return next(line for line in lines if wanted in line.get("reason", ""))


async def test_only_peers_of_the_authority_get_in(authority: Authority, stranger: Authority) -> None:
    async with serving(Tls(authority.issue(REGISTRY), REGISTRY)) as address:
        assert await status(address, Tls(authority.issue(GATE))) is grpc.StatusCode.OK
        assert await status(address, Tls(stranger.issue(GATE))) is grpc.StatusCode.UNAVAILABLE
        assert await status(address, None) is grpc.StatusCode.UNAVAILABLE


async def test_each_refusal_says_why_and_of_whom(authority: Authority, stranger: Authority) -> None:
    own = authority.issue(REGISTRY)
    tls = Tls(own, REGISTRY)
    for reason, context in (
        ("it shows no certificate", client_context(own.ca)),
        ("certificate has expired", client_context(own.ca, authority.issue(GATE, valid=EXPIRED))),
        ("unable to get local issuer certificate", client_context(own.ca, stranger.issue(GATE))),
    ):
        # A server of its own: one logs at most one refusal in a second.
        async with serving(tls) as address:
            line = await refusal(lambda: raw(address, context), reason)  # noqa: B023 - called in this turn
            assert (line["event"], line["peer"].split(":")[0]) == ("connection refused", "127.0.0.1")
    for sent in (b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", LINK, b"nonsense"):
        async with serving(tls) as address:
            wanted = "it speaks plain text, and this port TLS"
            await refusal(lambda: raw(address, None, sent), wanted)  # noqa: B023 - called in this turn


async def test_tls_at_a_port_of_plain_text_says_so(authority: Authority) -> None:
    context = client_context(authority.issue(GATE).ca)
    async with serving(None) as address:
        await refusal(lambda: raw(address, context), "it speaks TLS, and this port plain text")


async def test_peers_of_other_roles_may_only_ask_for_the_health(authority: Authority) -> None:
    tls = Tls(authority.issue(REGISTRY), REGISTRY)
    async with serving(tls, tls.uri(ENVOY)) as address:
        for role, answer in (
            (ENVOY, grpc.StatusCode.UNIMPLEMENTED),
            (GATE, grpc.StatusCode.PERMISSION_DENIED),
            (f"{EVALUATOR}/digits", grpc.StatusCode.PERMISSION_DENIED),
            (f"{OPERATOR}/{ENVOY}", grpc.StatusCode.PERMISSION_DENIED),
            (f"{ENVOY}/{ENVOY}", grpc.StatusCode.PERMISSION_DENIED),
        ):
            peer = Tls(authority.issue(role))
            assert await status(address, peer, method=OTHER_METHOD) is answer, role
            assert await status(address, peer) is grpc.StatusCode.OK


async def test_a_name_in_another_domain_is_another_name(tmp_path: Path, authority: Authority) -> None:
    tls = Tls(authority.issue(REGISTRY), REGISTRY)
    # The same authority: it may sign for several meshes.
    other = Authority(authority.folder, domain="other.mesh").issue(ENVOY)
    async with serving(tls, tls.uri(ENVOY)) as address:
        code = await status(address, Tls(TlsFiles(other.cert, other.key, other.ca)), method=OTHER_METHOD)
        assert code is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("role", [GATE, f"{EVALUATOR}/registry", f"{OPERATOR}/registry"])
async def test_no_other_role_passes_for_a_registry(authority: Authority, role: str) -> None:
    client = Tls(authority.issue(GATE))
    async with serving(Tls(authority.issue(role))) as address:
        assert await status(address, client) is grpc.StatusCode.UNAVAILABLE
        # It is no matter of the address.
        assert await status(address.replace("127.0.0.1", "localhost"), client) is grpc.StatusCode.UNAVAILABLE
    async with serving(Tls(authority.issue(REGISTRY))) as address:
        assert await status(address, client) is grpc.StatusCode.OK
        assert await status(address.replace("127.0.0.1", "localhost"), client) is grpc.StatusCode.OK


async def test_peers_that_only_connect_lock_nobody_out(authority: Authority) -> None:
    async with serving(Tls(authority.issue(REGISTRY))) as address:
        host, _, port = address.rpartition(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(600)]
        try:
            assert await status(address, Tls(authority.issue(GATE))) is grpc.StatusCode.OK
        finally:
            for each in idle:
                each.close()


async def test_of_too_many_unfinished_handshakes_the_oldest_lose_their_connections(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_server, "HANDSHAKE_S", 3600.0)
    async with serving(Tls(authority.issue(REGISTRY))) as address, asyncio.timeout(PATIENCE_S):
        host, _, port = address.rpartition(":")
        # All at once, before the server accepts any.
        idle = [socket.create_connection((host, int(port))) for _ in range(600)]
        try:
            for each in idle[:88]:
                each.setblocking(False)
                assert await asyncio.get_running_loop().sock_recv(each, 1) == b""
        finally:
            for each in idle:
                each.close()


async def test_new_files_are_for_new_connections_and_open_ones_go_on(authority: Authority) -> None:
    own, gate = authority.issue(REGISTRY), authority.issue(GATE)
    server, client = Tls(own, REGISTRY), Tls(gate)
    async with serving(server) as address, transport.channel(address, tls=client) as old:
        stub, request = health_pb2_grpc.HealthStub(old), health_pb2.HealthCheckRequest(service=transport.LIVE)
        await stub.Check(request, timeout=PATIENCE_S)
        # A new authority, and the one before it; then it alone with the next.
        for _ in range(2):
            authority = Authority(authority.folder, renew=True)
            with capture_logs() as lines:
                authority.issue(REGISTRY)
                authority.issue(GATE)
                assert await status(address, client) is grpc.StatusCode.OK
            assert [line["event"] for line in lines] == ["certificates changed"] * 2
        assert (
            await status(address, Tls(Authority(authority.folder.parent / "x").issue(GATE))) is not grpc.StatusCode.OK
        )
        await stub.Check(request, timeout=PATIENCE_S)


async def test_wrong_new_files_change_nothing_until_they_are_right(authority: Authority, stranger: Authority) -> None:
    own, gate = authority.issue(REGISTRY), Tls(authority.issue(GATE))
    server = Tls(own, REGISTRY)
    good = {path: path.read_bytes() for path in (own.cert, own.key, own.ca)}

    def write(files: Mapping[Path, bytes]) -> None:
        for path, content in files.items():
            path.unlink(missing_ok=True)
            path.write_bytes(content)

    def pair(files: TlsFiles) -> dict[Path, bytes]:
        return {own.cert: files.cert.read_bytes(), own.key: files.key.read_bytes()}

    other = stranger.issue(REGISTRY)
    async with serving(server) as address:
        for wrong, reason in (
            ({own.key: b""}, "are no certificate and its key"),
            ({own.key: other.key.read_bytes()}, "the key is another's"),
            ({own.ca: b"no authority"}, f"--tls-ca {own.ca} has no certificate of an authority"),
            (pair(other), "is none that a peer with --tls-ca"),
            (pair(authority.issue(f"{EVALUATOR}/x")), "this process needs the URI"),
            (pair(authority.issue(f"{EVALUATOR}/x", valid=EXPIRED)), "certificate has expired"),
        ):
            write(good)
            assert await status(address, gate) is grpc.StatusCode.OK
            write(wrong)
            with capture_logs() as lines:
                assert await status(address, gate) is grpc.StatusCode.OK
                assert await status(address, gate) is grpc.StatusCode.OK
            (line,) = (each for each in lines if each["log_level"] == "error")
            assert line["event"] == "certificates unchanged"
            assert reason in line["reason"]
        own.key.unlink()
        assert await status(address, gate) is grpc.StatusCode.OK


def refused(files: TlsFiles, role: str | None = None) -> str:
    with pytest.raises(StartError) as error:
        Tls(files, role)
    return str(error.value)


def test_wrong_files_end_the_start_with_their_names(authority: Authority, stranger: Authority, tmp_path: Path) -> None:
    good, other = authority.issue(GATE), stranger.issue(GATE)
    missing = tmp_path / "missing.pem"
    assert refused(TlsFiles(missing, good.key, good.ca)) == f"can't read {missing} for TLS: No such file or directory"
    assert f"--tls-ca {good.key} has no" in refused(TlsFiles(good.cert, good.key, good.key))
    swapped = refused(TlsFiles(good.key, good.cert, good.ca))
    assert f"--tls-cert {good.key} and --tls-key {good.cert} are no certificate and its key" in swapped
    assert "the key is another's" in refused(TlsFiles(good.cert, other.key, good.ca))
    strange = refused(TlsFiles(other.cert, other.key, good.ca))
    assert strange.startswith(f"--tls-cert {other.cert} is none that a peer with --tls-ca {good.ca} takes: unable")
    wanted = "this process needs the URI spiffe://atserving/evaluator/digits"
    assert wanted in refused(good, f"{EVALUATOR}/digits")
    assert "this process needs the URI spiffe://other/gate" in refused(
        TlsFiles(good.cert, good.key, good.ca, "other"), GATE
    )
    assert "--tls-domain 'A b' should match" in refused(TlsFiles(good.cert, good.key, good.ca, "A b"))
    assert "certificate has expired" in refused(authority.issue(GATE, valid=EXPIRED))


async def test_with_tls_a_server_may_listen_on_all_addresses(authority: Authority) -> None:
    server = Server([])
    tls = Tls(authority.issue(REGISTRY), REGISTRY)
    port = await server.start("0.0.0.0:0", tls=tls)
    try:
        assert await status(f"127.0.0.1:{port}", Tls(authority.issue(GATE))) is grpc.StatusCode.OK
    finally:
        await server.stop(0)
    # An instance stops in two steps.
    await server.stop(0)
    assert await status(f"127.0.0.1:{port}", Tls(authority.issue(GATE))) is grpc.StatusCode.UNAVAILABLE
