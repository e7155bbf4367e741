"""`python -m registry` as an operator meets it: flags, health, signals, and etcd that comes and goes."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from atserving import transport
from atserving.config import release_key
from atserving.follower import ConfigFollower
from atserving.local.examples import ROOT
from atserving.local.ports import free_ports
from atserving.v1 import registry_pb2, registry_pb2_grpc
from registry.etcd import EtcdClient
from tests.processes import Etcd, Process, Registry, cluster
from tests.registry.etcd_users import USER, enable_rights
from tests.waiting import until, until_async

Start = Callable[[Process], Process]
RELEASE = '{"file": "file:///m.tar"}'


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "registry", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


async def health(address: str) -> health_pb2.HealthCheckResponse.ServingStatus.ValueType:
    async with transport.channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service="atserving.v1.RegistryService")
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, wait_for_ready=True, timeout=30)
        return answer.status  # type: ignore[no-any-return]


async def serving(address: str) -> bool:
    return await health(address) == health_pb2.HealthCheckResponse.SERVING


async def watch(address: str) -> object:
    async with transport.channel(address) as channel:
        return await registry_pb2_grpc.RegistryServiceStub(channel).Watch(registry_pb2.WatchRequest()).read()


async def refusal(address: str) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await watch(address)
    return failed.value


def test_help_names_every_flag() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    for flag in (
        "--etcd ",
        "--listen",
        "--etcd-ca",
        "--etcd-user",
        "--lease-ttl",
        "--log-level",
        "ATSERVING_ETCD_PASSWORD",
    ):
        assert flag in shown.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "Missing option '--etcd'"),
        (["--ectd", "h:1"], "No such option"),
        (["--etcd", "http://h:1"], "'http://h:1' is not host:port"),
        (["--etcd", "h:1", "--lease-ttl", "soon"], "'soon' should be nanoseconds or a duration"),
        (["--etcd", "h:1", "--lease-ttl", "10ms"], "'10ms' should be whole seconds"),
        (["--etcd", "h:1", "--etcd-cert", "x.pem"], "--etcd-cert and --etcd-key go together"),
        (["--etcd", "h:1", "--etcd-user", "x"], "--etcd-user and --etcd-password go together"),
        (["--etcd", "h:1", "--etcd-ca", "/no/such.pem"], "can't use /no/such.pem"),
        (["--etcd", "h:1", "--etcd-ca", "setup.cfg"], "can't use setup.cfg"),
    ],
)
def test_a_wrong_flag_is_one_line(flags: list[str], words: str) -> None:
    refused = run(*flags)
    assert refused.returncode in (1, 2)
    assert words in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused = run(
            "--etcd", "127.0.0.1:1", "--listen", f"127.0.0.1:{taken.getsockname()[1]}", "--log-level", "error"
        )
    assert refused.returncode == 1
    assert [line for line in refused.stderr.splitlines() if line.startswith("registry: cannot listen on")]


async def test_without_etcd_it_waits_and_says_so_once(tmp_path: Path, processes: Start) -> None:
    (member,) = cluster(tmp_path, ["one"])
    registry = Registry(tmp_path, [member.address])
    processes(registry)
    assert await health(registry.address) == health_pb2.HealthCheckResponse.NOT_SERVING
    for _ in range(5):
        error = await refusal(registry.address)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "etcd is unreachable" in (error.details() or "")
    await until(lambda: "etcd unreachable" in registry.log_text())
    processes(member)
    await until_async(lambda: serving(registry.address))
    response = await watch(registry.address)
    assert isinstance(response, registry_pb2.WatchResponse)
    assert response.reset
    assert registry.log_text().count('"etcd unreachable"') == 1


async def test_with_etcd_away_it_serves_what_it_knows_but_a_new_one_serves_nothing(
    tmp_path: Path, etcd: Etcd, client: EtcdClient, processes: Start
) -> None:
    await client.put(release_key("a", "1"), RELEASE)
    registry = Registry(tmp_path, [etcd.address])
    processes(registry)
    await until_async(lambda: serving(registry.address))
    etcd.kill()
    await until(lambda: "etcd unreachable" in registry.log_text())
    assert await serving(registry.address)
    response = await watch(registry.address)
    assert isinstance(response, registry_pb2.WatchResponse)
    assert [entry.key for entry in response.upserts] == [release_key("a", "1")]
    async with transport.channel(registry.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="etcd is unreachable: ") as failed:
            await registry_pb2_grpc.ReleaseServiceStub(channel).SetPhase(
                registry_pb2.SetPhaseRequest(app="a", version="1", phase=registry_pb2.PHASE_PRODUCTION)
            )
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
    registry.kill()
    registry.start()
    assert (await refusal(registry.address)).code() is grpc.StatusCode.UNAVAILABLE
    etcd.start()
    await until_async(lambda: serving(registry.address))


async def test_sigterm_ends_the_streams_and_exits_0(tmp_path: Path, etcd: Etcd, processes: Start) -> None:
    registry = Registry(tmp_path, [etcd.address])
    processes(registry)
    await until_async(lambda: serving(registry.address))
    async with transport.channel(registry.address) as channel:
        call = registry_pb2_grpc.RegistryServiceStub(channel).Watch(registry_pb2.WatchRequest())
        await call.read()
        registry.send(signal.SIGTERM)
        with pytest.raises(grpc.aio.AioRpcError, match="the registry is stopping"):
            await call.read()
    assert await registry.ended() == 0
    assert "Traceback" not in registry.log_text()


async def test_sigterm_before_etcd_was_seen_exits_0(tmp_path: Path, processes: Start) -> None:
    registry = Registry(tmp_path, [f"127.0.0.1:{free_ports(1)[0]}"])
    processes(registry)
    await health(registry.address)
    registry.send(signal.SIGTERM)
    assert await registry.ended() == 0
    assert "Traceback" not in registry.log_text()


async def test_a_follower_goes_from_registry_to_registry(
    tmp_path: Path, etcd: Etcd, client: EtcdClient, processes: Start
) -> None:
    key = release_key("a", "1")
    await client.put(key, RELEASE)
    both = [Registry(tmp_path, [etcd.address]) for _ in range(2)]
    for registry in both:
        processes(registry)
    deleted: set[str] = set()
    follower = ConfigFollower([r.address for r in both], lambda _, deletes: deleted.update(deletes))
    following = asyncio.create_task(follower.run())
    await follower.synced.wait()
    for number, (lost, other) in enumerate([both, both[::-1]]):
        await until_async(lambda other=other: serving(other.address))  # type: ignore[misc]
        (lost.kill if number else lambda lost=lost: lost.send(signal.SIGTERM))()  # type: ignore[misc]
        new = release_key("a", str(number + 2))
        await client.put(new, RELEASE)
        await until(lambda new=new: new in follower.entries)  # type: ignore[misc]
        if not number:
            await lost.ended()
        lost.start()
    assert not deleted
    assert follower.entries.keys() == {release_key("a", str(number)) for number in (1, 2, 3)}
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


async def test_the_password_comes_by_its_variable_and_is_never_logged(
    tmp_path: Path, etcd: Etcd, processes: Start
) -> None:
    enable_rights(etcd)
    flags = ("--etcd-user", USER.name, "--log-level", "debug")
    registry = Registry(tmp_path, [etcd.address], *flags, ATSERVING_ETCD_PASSWORD=USER.password)
    processes(registry)
    await until_async(lambda: serving(registry.address))
    wrong = Registry(tmp_path, [etcd.address], *flags, ATSERVING_ETCD_PASSWORD="not-the-password")
    processes(wrong)
    await until(lambda: "etcd refuses the registry" in wrong.log_text())
    assert "invalid user ID or password" in (await refusal(wrong.address)).details()  # type: ignore[operator]
    assert USER.password not in registry.log_text()
    assert "not-the-password" not in wrong.log_text()


class Relay:
    """A way to a port that can be cut and mended."""

    def __init__(self, target: str) -> None:
        self._target = target.rpartition(":")
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self.address = f"127.0.0.1:{free_ports(1)[0]}"

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._accept, *self.address.split(":"))

    async def cut(self) -> None:
        assert self._server
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._target[0], int(self._target[2]))
        self._open |= {writer, back}
        await asyncio.gather(self._copy(reader, back), self._copy(there, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
        writer.transport.abort()
        self._open.discard(writer)


async def test_a_follower_leaves_a_registry_that_has_lost_etcd_and_forgets_nothing(
    tmp_path: Path, etcd: Etcd, processes: Start, client: EtcdClient
) -> None:
    relay = Relay(etcd.address)
    await relay.mend()
    cut_off, other = Registry(tmp_path, [relay.address]), Registry(tmp_path, [etcd.address])
    for registry in (cut_off, other):
        processes(registry)
        await until_async(lambda registry=registry: serving(registry.address))  # type: ignore[misc]
    await client.put(release_key("a", "1"), RELEASE)
    deleted: set[str] = set()
    follower = ConfigFollower([cut_off.address, other.address], lambda _, deletes: deleted.update(deletes))
    following = asyncio.create_task(follower.run())
    await until(lambda: release_key("a", "1") in follower.entries)
    await relay.cut()
    await client.put(release_key("a", "2"), RELEASE)
    await until(lambda: release_key("a", "2") in follower.entries)
    # With the other one gone too, what the isolated one knows is older than what is known.
    other.kill()
    await until(lambda: "has lost etcd" in follower.last_error)
    assert follower.entries.keys() == {release_key("a", "1"), release_key("a", "2")}
    # Nobody else being there, one that starts now is better off with the last known config than with none.
    late = ConfigFollower([cut_off.address], lambda _, __: None)
    starting = asyncio.create_task(late.run())
    await late.synced.wait()
    assert late.entries.keys() == {release_key("a", "1")}
    await relay.mend()
    await until(lambda: release_key("a", "2") in late.entries)
    assert not deleted
    for task in (following, starting):
        task.cancel()
    await asyncio.gather(following, starting, return_exceptions=True)
    await relay.cut()


async def test_releases_can_have_a_port_of_their_own(tmp_path: Path, etcd: Etcd, processes: Start) -> None:
    (port,) = free_ports(1)
    registry = Registry(tmp_path, [etcd.address], "--listen-releases", f"127.0.0.1:{port}")
    processes(registry)
    await until_async(lambda: serving(registry.address))
    request = registry_pb2.ListReleasesRequest()
    async with transport.channel(f"127.0.0.1:{port}") as apart, transport.channel(registry.address) as channel:
        assert not (await registry_pb2_grpc.ReleaseServiceStub(apart).ListReleases(request)).releases
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await registry_pb2_grpc.ReleaseServiceStub(channel).ListReleases(request)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_second_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused = run("--etcd", "127.0.0.1:1", "--listen", "127.0.0.1:0", "--listen-releases", address)
    assert refused.returncode == 1
    assert refused.stderr == f"registry: cannot listen on {address}: the address is in use or not this machine's\n"
