"""`python -m registry` as an operator runs it: flags, health, signals, outages of etcd, failover of its followers."""

from __future__ import annotations

import asyncio
import itertools
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from atserving import transport
from atserving.admin.v1 import admin_pb2, admin_pb2_grpc
from atserving.cli import service
from atserving.config import Release, release_key
from atserving.follower import ConfigFollower
from atserving.local import commands
from atserving.local.authority import Authority
from atserving.local.examples import ROOT
from atserving.local.ports import free_ports
from atserving.v1 import registry_pb2, registry_pb2_grpc
from registry.__main__ import main
from registry.etcd import Connection, EtcdClient
from tests.processes import Etcd, Process, Registry, cluster
from tests.registry.etcd_users import USER, enable_rights
from tests.waiting import until, until_async

Start = Callable[[Process], Process]
RELEASE = '{"file": "file:///m.tar"}'
_numbers = itertools.count()


@dataclass(frozen=True)
class Ended:
    """The exit status and the output of a command."""

    status: object
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs the command in this process, for flags with which no registry starts."""

    def run(*flags: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["registry", *flags])
        with pytest.raises(SystemExit) as ended:
            service.run(main, "registry")
        return Ended(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def app() -> str:
    """An app of the test's own, in the etcd that the tests share."""
    return f"process-{next(_numbers)}"


@pytest.fixture
async def shared_client(shared_etcd: Etcd) -> AsyncIterator[EtcdClient]:
    async with EtcdClient(Connection([shared_etcd.address])) as client:
        yield client


def start(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "registry", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


async def health(address: str) -> int:
    async with transport.channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service="atserving.v1.RegistryService")
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, wait_for_ready=True, timeout=30)
        return int(answer.status)


async def serving(address: str) -> bool:
    return await health(address) == int(health_pb2.HealthCheckResponse.SERVING)


async def watch(address: str) -> object:
    async with transport.channel(address) as channel:
        return await registry_pb2_grpc.RegistryServiceStub(channel).Watch(registry_pb2.WatchRequest()).read()


async def refusal(address: str) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await watch(address)
    return failed.value


def test_help_names_every_flag(run: Callable[..., Ended]) -> None:
    shown = run("--help")
    assert shown.status == 0
    for flag in (
        "--etcd ",
        "--listen",
        "--etcd-ca",
        "--etcd-user",
        "--lease-ttl",
        "--log-level",
        "ATSERVING_ETCD_PASSWORD",
    ):
        assert flag in shown.out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "Missing option '--etcd'"),
        (["--ectd", "h:1"], "No such option"),
        (["--etcd", "http://h:1"], "'http://h:1' is not host:port"),
        (["--etcd", "h:1", "--lease-ttl", "soon"], "'soon' should be nanoseconds or a duration"),
        (["--etcd", "h:1", "--lease-ttl", "10ms"], "'10ms' should be whole seconds"),
        (["--etcd", "h:1", "--etcd-cert", "x.pem"], "--etcd-cert and --etcd-key must be given together"),
        (
            ["--etcd", "h:1", "--etcd-user", "x"],
            "ATSERVING_ETCD_PASSWORD or --etcd-password-file go together",
        ),
        (["--etcd", "h:1", "--etcd-user", "x", "--etcd-password", "y"], "is visible to everybody on this machine"),
        (["--etcd", "h:1", "--etcd-user", "x", "--etcd-password-file", "/no/file"], "/no/file: No such file"),
        (["--etcd", "h:1", "--etcd-ca", "/no/such.pem"], "can't load /no/such.pem"),
        (["--etcd", "h:1", "--etcd-ca", "setup.cfg"], "can't load setup.cfg"),
    ],
)
def test_a_wrong_flag_is_reported_in_one_line(run: Callable[..., Ended], flags: list[str], words: str) -> None:
    refused = run(*flags)
    assert refused.status in (1, 2)
    assert words in refused.err
    assert refused.err.count("\n") == 1


@pytest.mark.parametrize("flags", [["--listen"], ["--listen", "127.0.0.1:0", "--listen-operators"]])
def test_a_port_in_use_is_reported_in_one_line(flags: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused = start("--etcd", "127.0.0.1:1", *flags, address)
    assert refused.returncode == 1
    assert refused.stderr == f"registry: cannot listen on {address}: the address is in use\n"


def test_without_operators_only_this_machine_reaches_their_api() -> None:
    with socket.socket() as taken:
        with suppress(OSError):
            # Somebody else may have it.
            taken.bind(("127.0.0.1", 50054))
            taken.listen()
        refused = start("--etcd", "127.0.0.1:1", "--listen", "0.0.0.0:0", "--insecure")
    assert refused.returncode == 1
    assert refused.stderr == (
        "registry: cannot listen on 127.0.0.1:50054: the address is in use; --listen-operators takes another address\n"
    )
    refused = start("--etcd", "127.0.0.1:1", "--listen", "127.0.0.1:0", "--listen-operators", "0.0.0.0:0")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "name the operators by --operators, or pass --insecure" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "apart"),
    [
        (["--listen", "0.0.0.0:0", "--insecure", "--listen-operators", "0.0.0.0:0"], True),
        (["--listen", "0.0.0.0:0", "--insecure", "--operators", "{}"], False),
        (["--listen", "localhost:0"], False),
    ],
)
def test_operators_may_have_the_port_of_the_others(
    tmp_path: Path, processes: Start, flags: list[str], apart: bool
) -> None:
    (tmp_path / "operators").write_text("{}")
    given = [each.replace("{}", str(tmp_path / "operators")) for each in flags]
    registry = Registry(tmp_path, ["127.0.0.1:1"], *given)
    processes(registry)
    line = registry.logged(event="service starting")
    assert (line["port"] != line["operators_port"]) is apart
    warned = [each for each in registry.lines if "operators unknown" in each]
    assert bool(warned) is ("--operators" not in flags)


def test_with_tls_operators_may_be_anywhere_without_consent_to_plain_text(tmp_path: Path, processes: Start) -> None:
    certificate = commands.tls(Authority(tmp_path / "certs").issue("registry"))
    listen = ["--listen", "0.0.0.0:0", "--listen-operators", "0.0.0.0:0"]
    registry = Registry(tmp_path, ["127.0.0.1:1"], *listen, *certificate)
    processes(registry)
    registry.logged(event="service starting")
    (warned,) = [each for each in registry.lines if "operators unknown" in each]
    assert "an operator or an Envoy that reaches 0.0.0.0:0 may publish" in warned


async def test_a_registry_waits_for_etcd_and_logs_it_once(tmp_path: Path, processes: Start) -> None:
    (member,) = cluster(tmp_path, ["one"])
    registry = Registry(tmp_path, [member.address])
    processes(registry)
    assert await health(registry.address) == health_pb2.HealthCheckResponse.NOT_SERVING
    for _ in range(5):
        error = await refusal(registry.address)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "etcd is unreachable" in (error.details() or "")
    await until(lambda: "etcd lost" in registry.log_text())
    processes(member)
    await until_async(lambda: serving(registry.address))
    response = await watch(registry.address)
    assert isinstance(response, registry_pb2.WatchResponse)
    assert response.reset
    assert registry.log_text().count('"etcd lost"') == 1


async def test_without_etcd_a_registry_serves_the_last_known_config_but_a_new_one_serves_nothing(
    tmp_path: Path, etcd: Etcd, client: EtcdClient, processes: Start
) -> None:
    await client.put(release_key("a", "1"), RELEASE)
    registry = Registry(tmp_path, [etcd.address])
    processes(registry)
    await until_async(lambda: serving(registry.address))
    etcd.kill()
    await until(lambda: "etcd lost" in registry.log_text())
    assert await serving(registry.address)
    response = await watch(registry.address)
    assert isinstance(response, registry_pb2.WatchResponse)
    assert [entry.key for entry in response.upserts] == [release_key("a", "1")]
    async with transport.channel(registry.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="etcd is unreachable: ") as failed:
            await admin_pb2_grpc.AdminServiceStub(channel).PromoteRelease(
                admin_pb2.PromoteReleaseRequest(app="a", version="1")
            )
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
    registry.kill()
    registry.start()
    assert (await refusal(registry.address)).code() is grpc.StatusCode.UNAVAILABLE
    etcd.start()
    await until_async(lambda: serving(registry.address))


async def test_sigterm_ends_the_streams_and_exits_0(tmp_path: Path, shared_etcd: Etcd, processes: Start) -> None:
    registry = Registry(tmp_path, [shared_etcd.address])
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


async def test_sigterm_before_the_first_snapshot_exits_0(tmp_path: Path, processes: Start) -> None:
    registry = Registry(tmp_path, [f"127.0.0.1:{free_ports(1)[0]}"])
    processes(registry)
    await health(registry.address)
    registry.send(signal.SIGTERM)
    assert await registry.ended() == 0
    assert "Traceback" not in registry.log_text()


@asynccontextmanager
async def running(follower: ConfigFollower) -> AsyncIterator[ConfigFollower]:
    task = asyncio.create_task(follower.run())
    try:
        await follower.synced.wait()
        yield follower
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def releases(follower: ConfigFollower) -> set[str]:
    """The releases that a follower of one app knows; its other entries are defaults."""
    return {key for key, value in follower.entries.items() if isinstance(value, Release)}


async def test_a_follower_fails_over_between_registries(
    tmp_path: Path, shared_etcd: Etcd, shared_client: EtcdClient, processes: Start, app: str
) -> None:
    await shared_client.put(release_key(app, "1"), RELEASE)
    one, two = (Registry(tmp_path, [shared_etcd.address]) for _ in range(2))
    deleted: set[str] = set()

    async def published(version: str, follower: ConfigFollower) -> None:
        key = release_key(app, version)
        await shared_client.put(key, RELEASE)
        await until(lambda: key in follower.entries)

    for registry in (one, two):
        processes(registry)
    addresses = [one.address, two.address]
    async with running(ConfigFollower(addresses, lambda _, deletes: deleted.update(deletes), app)) as follower:
        await until_async(lambda: serving(two.address))
        one.send(signal.SIGTERM)
        await published("2", follower)
        await one.ended()
        one.start()
        await until_async(lambda: serving(one.address))
        two.kill()
        await published("3", follower)
        assert releases(follower) == {release_key(app, version) for version in ("1", "2", "3")}
    assert not deleted


async def test_the_password_is_read_from_its_variable_or_file_and_never_logged(
    tmp_path: Path, etcd: Etcd, processes: Start
) -> None:
    enable_rights(etcd)
    flags = ("--etcd-user", USER.name, "--log-level", "debug")
    registry = Registry(tmp_path, [etcd.address], *flags, ATSERVING_ETCD_PASSWORD=USER.password)
    processes(registry)
    await until_async(lambda: serving(registry.address))
    file = tmp_path / "password"
    file.write_text(f"{USER.password}\n")
    other = Registry(tmp_path, [etcd.address], *flags, "--etcd-password-file", str(file))
    processes(other)
    await until_async(lambda: serving(other.address))
    wrong = Registry(tmp_path, [etcd.address], *flags, ATSERVING_ETCD_PASSWORD="not-the-password")
    processes(wrong)
    await until(lambda: "invalid user ID or password" in wrong.log_text())
    assert "invalid user ID or password" in ((await refusal(wrong.address)).details() or "")
    assert USER.password not in registry.log_text()
    assert "not-the-password" not in wrong.log_text()


class Relay:
    """Relays a port until it is cut; mend() relays again."""

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


async def test_a_follower_moves_on_from_a_registry_without_etcd_and_forgets_nothing(
    tmp_path: Path, shared_etcd: Etcd, shared_client: EtcdClient, processes: Start, app: str
) -> None:
    first, second = release_key(app, "1"), release_key(app, "2")
    relay = Relay(shared_etcd.address)
    await relay.mend()
    isolated, other = Registry(tmp_path, [relay.address]), Registry(tmp_path, [shared_etcd.address])
    for registry in (isolated, other):
        processes(registry)
    for registry in (isolated, other):
        await until_async(lambda registry=registry: serving(registry.address))  # type: ignore[misc]
    await shared_client.put(first, RELEASE)
    deleted: set[str] = set()
    addresses = [isolated.address, other.address]
    async with running(ConfigFollower(addresses, lambda _, deletes: deleted.update(deletes), app)) as follower:
        await until(lambda: first in follower.entries)
        await relay.cut()
        await shared_client.put(second, RELEASE)
        await until(lambda: second in follower.entries)
        # Without the other registry, the isolated one has an older config than the follower.
        other.kill()
        await until(lambda: "has lost etcd" in follower.last_error)
        assert releases(follower) == {first, second}
        # A follower that starts now takes the last known config of the only registry.
        async with running(ConfigFollower([isolated.address], app=app)) as late:
            assert releases(late) == {first}
            await relay.mend()
            await until(lambda: second in late.entries)
    assert not deleted
    await relay.cut()


async def test_the_operators_api_can_have_a_port_of_its_own(
    tmp_path: Path, shared_etcd: Etcd, processes: Start, app: str
) -> None:
    (port,) = free_ports(1)
    registry = Registry(tmp_path, [shared_etcd.address], "--listen-operators", f"127.0.0.1:{port}")
    processes(registry)
    await until_async(lambda: serving(registry.address))
    request = admin_pb2.ListReleasesRequest(app="-", filter=app)
    async with transport.channel(f"127.0.0.1:{port}") as apart, transport.channel(registry.address) as channel:
        assert not (await admin_pb2_grpc.AdminServiceStub(apart).ListReleases(request)).releases
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await admin_pb2_grpc.AdminServiceStub(channel).ListReleases(request)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
