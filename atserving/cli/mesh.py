"""The whole mesh on one machine: etcd, registry, gate, evaluators and Envoy, as processes that supervisord keeps."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import xmlrpc.client
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import grpc.aio
import orjson
import yaml
from supervisor.xmlrpc import SupervisorTransport

from atserving import transport
from atserving.errors import StartError
from atserving.local import examples
from atserving.local.examples import ROOT, Example
from atserving.v1 import registry_pb2, registry_pb2_grpc

_POLL_S = 0.05


@dataclass(frozen=True)
class Ports:
    """The loopback ports of a mesh."""

    edge: int
    ops: int
    admin: int
    gates: tuple[int, ...]
    registry: int
    etcd: int
    etcd_peer: int
    files: int

    @staticmethod
    def free(edge: int = 0, gates: int = 1) -> Ports:
        """Ports nobody uses now; ``edge`` is kept where it is given."""
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(7 + gates)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            first, ops, admin, registry, etcd, etcd_peer, files, *rest = [
                int(each.getsockname()[1]) for each in sockets
            ]
        return Ports(edge or first, ops, admin, tuple(rest), registry, etcd, etcd_peer, files)


class Mesh:
    """A mesh serving example releases, in a directory that holds its config, its data and its logs.

    An async context manager: entering starts every process and waits until each release answers; leaving stops them.
    The processes are named ``etcd``, ``registry``, ``gate``, ``gate-1``, ..., ``envoy``, ``files``, which serves the
    examples' folder at ``files_url``, and ``evaluator-<app>-<version>``. ``extra`` is passed to the processes named as
    flags, so that a test can shorten a lease.
    """

    def __init__(
        self,
        edge_port: int = 0,
        serves: Sequence[Example] = examples.DIGITS,
        *,
        gates: int = 1,
        start_timeout_s: float = 90.0,
        extra: dict[str, list[str]] | None = None,
    ) -> None:
        self.serves = serves
        self.ports = Ports.free(edge_port, gates)
        self.url = f"http://127.0.0.1:{self.ports.edge}"
        self.registry = f"127.0.0.1:{self.ports.registry}"
        self.files_url = f"http://127.0.0.1:{self.ports.files}"
        self._start_timeout_s = start_timeout_s
        self._extra = extra or {}
        self._supervisord: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Mesh:
        for needed in (ROOT / "envoy" / "envoy.yaml", *(each.path for each in self.serves)):
            if not needed.exists():
                raise StartError(f"{needed.relative_to(ROOT)} is not there: the local mesh runs from a checkout")
        _check_free(self.ports.edge)
        self.directory = Path(tempfile.mkdtemp(prefix="atserving-"))
        self._write_envoy()
        self._write_supervisord()
        try:
            self._supervisord = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "supervisor.supervisord", "-n", "-c", f"{self.directory}/supervisord.conf"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                # ctrl-C is for the command in the foreground, which then stops its processes in order.
                start_new_session=True,
            )
            await self._wait_ready()
        except BaseException as error:
            await self._stop()
            if not isinstance(error, StartError):
                shutil.rmtree(self.directory, ignore_errors=True)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    async def _stop(self) -> None:
        if self._supervisord:
            with suppress(ProcessLookupError):
                self._supervisord.terminate()
            while self._supervisord.returncode is None:
                await self._wake_supervisor()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._supervisord.wait(), _POLL_S)
            _kill_session(self._supervisord.pid)

    async def _wake_supervisor(self) -> None:
        """supervisord starts what is to start, and sees what has ended, once a second or when somebody connects."""
        with suppress(OSError):
            _, writer = await asyncio.open_unix_connection(f"{self.directory}/supervisor.sock")
            writer.close()

    @property
    def supervisor(self) -> Any:
        """supervisord's own XML-RPC interface, to stop, start and look at single processes."""
        socket_path = f"unix://{self.directory}/supervisor.sock"
        return xmlrpc.client.ServerProxy("http://127.0.0.1", SupervisorTransport(None, None, socket_path)).supervisor

    def stop_process(self, name: str) -> None:
        """Stops one process (SIGTERM) and waits until it has ended; it stays down."""
        self.supervisor.stopProcess(_full_name(name))

    def start_process(self, name: str) -> None:
        """Starts one process that was stopped."""
        self.supervisor.startProcess(_full_name(name), False)

    def kill_process(self, name: str) -> None:
        """Kills one process (SIGKILL), as a crash would; it is started again."""
        os.kill(self.supervisor.getProcessInfo(_full_name(name))["pid"], signal.SIGKILL)

    def log(self, name: str) -> str:
        """What a process has logged so far."""
        return (self.directory / f"{name}.log").read_text(errors="replace")

    async def wait_supervisor(self) -> int:
        """Waits until supervisord itself ends, which it does not by itself."""
        assert self._supervisord
        return await self._supervisord.wait()

    def _commands(self) -> dict[str, list[str]]:
        ports, python = self.ports, [sys.executable, "-m"]
        bin_ = Path(sys.executable).parent
        etcd, peer = f"http://127.0.0.1:{ports.etcd}", f"http://127.0.0.1:{ports.etcd_peer}"
        commands = {
            "etcd": [
                *(str(bin_ / "etcd"), "--data-dir", str(self.directory / "etcd"), "--log-level", "warn"),
                *("--listen-client-urls", etcd, "--advertise-client-urls", etcd),
                *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                *("--initial-cluster", f"default={peer}"),
            ],
            "registry": [*python, "registry", "--etcd", f"127.0.0.1:{ports.etcd}", "--listen", self.registry],
            "envoy": [
                *(str(bin_ / "envoy"), "-c", str(self.directory / "envoy.yaml"), "--use-dynamic-base-id"),
                *("--concurrency", "1", "--log-level", "warning"),
            ],
            # The pictures by http, so that a request can name one.
            "files": [*python, "http.server", "--bind", "127.0.0.1", "-d", str(examples.FOLDER), str(ports.files)],
        }
        for number, port in enumerate(ports.gates):
            # Nothing stands in front of the only gate that could send callers elsewhere while it drains.
            drain = [] if len(ports.gates) > 1 else ["--drain", "0"]
            commands[f"gate-{number}" if number else "gate"] = [
                *(*python, "gate", "--registry", self.registry, "--listen", f"127.0.0.1:{port}", *drain),
            ]
        for each in self.serves:
            commands[f"evaluator-{each.app}-{each.version}"] = [
                *(*python, "evaluator", "--app", each.app, "--version", each.version, "--registry", self.registry),
                *("--listen", "127.0.0.1:0", "--wait", "60", "--allow-network", "127.0.0.0/8"),
                *("--workspace", str(self.directory / "workspaces")),
            ]
        return {name: [*command, *self._extra.get(name, [])] for name, command in commands.items()}

    def _write_supervisord(self) -> None:
        directory = self.directory
        sections = [
            f"[unix_http_server]\nfile={directory}/supervisor.sock\nchmod=0600",
            f"[supervisord]\nlogfile={directory}/supervisord.log\npidfile={directory}/supervisord.pid\nnodaemon=true",
            "[rpcinterface:supervisor]\nsupervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
            f"[supervisorctl]\nserverurl=unix://{directory}/supervisor.sock",
        ]
        commands = self._commands()
        for priority, (group, names) in enumerate(_groups(commands).items()):
            sections.append(f"[group:{group}]\nprograms={','.join(names)}\npriority={priority}")
        for name, command in commands.items():
            line = shlex.join(command).replace("%", "%%")
            sections.append(
                f"[program:{name}]\ncommand={line}\nautorestart=true\nstartsecs=1\n"
                f"startretries=1000\nstopwaitsecs=20\nredirect_stderr=true\nstdout_logfile={directory}/{name}.log\n"
                f"directory={directory}"
            )
        (directory / "supervisord.conf").write_text("\n\n".join(sections) + "\n")

    def _write_envoy(self) -> None:
        text = (ROOT / "envoy" / "envoy.yaml").read_text().replace("/etc/envoy/", f"{ROOT}/envoy/")
        bootstrap = yaml.safe_load(text)
        _set_address(bootstrap["admin"], self.ports.admin)
        resources = bootstrap["static_resources"]
        for listener in resources["listeners"]:
            _set_address(listener, {"edge": self.ports.edge, "ops": self.ports.ops}[listener["name"]])
        for cluster in resources["clusters"]:
            ports = {"gate": self.ports.gates, "admin": (self.ports.admin,)}[cluster["name"]]
            endpoints = cluster["load_assignment"]["endpoints"][0]
            endpoints["lb_endpoints"] = [{"endpoint": _set_address({}, port)} for port in ports]
        (self.directory / "envoy.yaml").write_text(yaml.safe_dump(bootstrap))

    async def _wait_ready(self) -> None:
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await self._publish()
                async with aiohttp.ClientSession() as session:
                    for each in self.serves:
                        await self._wait_answer(session, each)
        except TimeoutError:
            raise StartError(
                f"not ready within {self._start_timeout_s:g} s: {self._complaint()} (logs: {self.directory}/*.log)"
            ) from None

    async def _publish(self) -> None:
        async with transport.channel(self.registry) as channel:
            stub = registry_pb2_grpc.ReleaseServiceStub(channel)
            for each in self.serves:
                release = registry_pb2.Release(
                    name=each.app,
                    version=each.version,
                    file=f"{each.path.as_uri()}#sha256={hashlib.sha256(each.path.read_bytes()).hexdigest()}",
                    phase=each.phase,
                    desc=each.desc,
                    custom_values_json=orjson.dumps(each.custom_values).decode(),
                )
                while True:
                    try:
                        await stub.PublishRelease(registry_pb2.PublishReleaseRequest(release=release))
                        break
                    except grpc.aio.AioRpcError as error:
                        if error.code() is not grpc.StatusCode.UNAVAILABLE:
                            raise StartError(f"publishing {each.app} {each.version}: {error.details()}") from None
                        self._check_alive()
                        await self._wake_supervisor()
                        await asyncio.sleep(_POLL_S)

    async def _wait_answer(self, session: aiohttp.ClientSession, example: Example) -> None:
        data = [{"uri": f"{self.files_url}/{image}"} for image in example.images]
        request = {"data": data if len(data) > 1 else data[0]}
        url = f"{self.url}/v1/eval/{example.app}/{example.version}"
        while True:
            self._check_alive()
            try:
                async with session.post(url, json=request) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(_POLL_S)

    def _check_alive(self) -> None:
        assert self._supervisord
        if self._supervisord.returncode is not None:
            raise StartError(f"supervisord ended: {_last_line(self.directory / 'supervisord.log')}")

    def _complaint(self) -> str:
        """The last line of each process that is not running, or else where the logs are."""
        try:
            down = [each["name"] for each in self.supervisor.getAllProcessInfo() if each["statename"] != "RUNNING"]
        except OSError:
            down = []
        said = "; ".join(f"{name}: {_last_line(self.directory / f'{name}.log')}" for name in down)
        return said or "every process runs, but not all answer"


def _groups(names: Iterable[str]) -> dict[str, list[str]]:
    """supervisord stops a group at once, the last group first: those that serve, then the registry, then etcd."""
    groups: dict[str, list[str]] = {"etcd": [], "registry": [], "serving": []}
    for name in names:
        groups[name if name in groups else "serving"].append(name)
    return groups


def _full_name(name: str) -> str:
    return f"{next(iter(_groups([name]).keys() & {name}), 'serving')}:{name}"


def _set_address(holder: dict[str, Any], port: int) -> dict[str, Any]:
    holder["address"] = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    return holder


def _kill_session(session_id: int) -> None:
    """Kills whatever supervisord left behind: its processes are in its session, even where it was killed itself."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session_id:
                os.kill(int(stat.parent.name), signal.SIGKILL)


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise StartError(f"port {port} is in use: choose another with --port or PORT=") from None


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else "no word"
