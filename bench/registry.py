"""Measure a registry and a gate of a large mesh: start, memory, how fast a change arrives, and heartbeats.

    python -m bench.registry [--apps 1000] [--versions 10] [--instances 10] [--heartbeats 2000] [--json FILE]

The config is written to a real etcd. The instances are keys only: nobody listens at their addresses.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc.aio
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from atserving import transport
from atserving.config import Instance, Release, app_metadata_key
from atserving.errors import StartError
from atserving.local import commands
from atserving.local.child import ChildProcess
from atserving.local.foreground import run_until_stopped
from atserving.local.ports import free_ports
from atserving.v1 import registry_pb2, registry_pb2_grpc, serving_pb2, serving_pb2_grpc
from registry.etcd import Connection, EtcdClient, put

_TXN_KEYS = 100
_CHANGES = 20
_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Figures:
    """What was measured; memory in MB (PSS), CPU in cores."""

    apps: int
    keys: int
    registry_ready_s: float
    registry_mb: float
    gate_ready_s: float
    gate_mb: float
    gate_connections: int
    change_ms: float
    """The median time from the end of a write to the first answer of the gate that follows it."""
    heartbeats: int
    """Instances that send heartbeats, each every third of the time to live that the registry names."""
    registry_cores: float
    etcd_cores: float


class _Mesh:
    """etcd, a registry and a gate, started one by one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.etcd_port, self.registry_port, self.gate_port = free_ports(3)
        self.etcd_address = f"127.0.0.1:{self.etcd_port}"
        self.registry_address = f"127.0.0.1:{self.registry_port}"
        self._children: list[ChildProcess] = []

    def _start(self, name: str, command: Sequence[str]) -> psutil.Process:
        child = ChildProcess(list(command), self._folder / f"{name}.log", cwd=self._folder)
        child.start()
        self._children.append(child)
        return psutil.Process(child.pid)

    def start_etcd(self) -> psutil.Process:
        peers = {"default": "unix://etcd-peers:0"}
        url = f"http://{self.etcd_address}"
        flags = ("--log-level", "warn", "--quota-backend-bytes", str(4 << 30))
        return self._start("etcd", commands.etcd(self._folder / "etcd", url, peers, *flags))

    def start_registry(self) -> psutil.Process:
        return self._start("registry", commands.registry([self.etcd_address], self.registry_address))

    def start_gate(self) -> psutil.Process:
        return self._start("gate", commands.gate(self.registry_address, f"127.0.0.1:{self.gate_port}"))

    def stop(self) -> None:
        for child in reversed(self._children):
            child.kill_session()


async def measure(apps: int, versions: int, instances: int, heartbeats: int, seconds: float) -> Figures:
    """Return the figures of a mesh with so many apps, versions of each, and instances of each version."""
    with tempfile.TemporaryDirectory(prefix="atserving-") as folder:
        mesh = _Mesh(Path(folder))
        try:
            return await _measure(mesh, apps, versions, instances, heartbeats, seconds)
        finally:
            mesh.stop()


async def _measure(mesh: _Mesh, apps: int, versions: int, instances: int, heartbeats: int, seconds: float) -> Figures:
    etcd = mesh.start_etcd()
    async with EtcdClient(Connection([mesh.etcd_address])) as client:
        await _until(lambda: client.put("/bench", "1"), Exception)
        keys = await _fill(client, apps, versions, instances)
        began_s = time.monotonic()
        registry = mesh.start_registry()
        await _serving(mesh.registry_port)
        registry_ready_s = time.monotonic() - began_s
        began_s = time.monotonic()
        gate = mesh.start_gate()
        await _serving(mesh.gate_port)
        gate_ready_s = time.monotonic() - began_s
        change_ms = statistics.median([await _change(mesh, client, number) for number in range(_CHANGES)]) * 1e3
        gate_mb, registry_mb = _megabytes(gate), _megabytes(registry)
        connections = len(gate.net_connections("tcp"))
        cores = await _beat(mesh, heartbeats, seconds, [registry, etcd])
    return Figures(
        apps,
        keys,
        round(registry_ready_s, 2),
        registry_mb,
        round(gate_ready_s, 2),
        gate_mb,
        connections,
        round(change_ms, 1),
        heartbeats,
        *(round(each, 3) for each in cores),
    )


async def _fill(client: EtcdClient, apps: int, versions: int, instances: int) -> int:
    """Write the releases and the instances; return their number."""
    operations = []
    for app in range(apps):
        for version in range(versions):
            release = Release(
                name=f"app{app}",
                version=f"v{version}",
                file=f"https://files.example/{app}/{version}.tar",
                phase="staging" if version else "production",
                custom_values={"net": "classify"},
            )
            operations.append(put(release.key, release.to_json()))
            for number in range(instances):
                one = Instance(
                    app=release.name,
                    version=release.version,
                    id=f"{app:05}{version:03}{number:03}",
                    address=f"127.1.{number}.{version}:9",
                    capacity=64,
                    digest=release.digest,
                )
                operations.append(put(one.key, one.to_json()))
    for start in range(0, len(operations), _TXN_KEYS):
        await client.txn([], operations[start : start + _TXN_KEYS])
    return len(operations)


async def _serving(port: int) -> None:
    async with transport.channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def check() -> None:
            response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=1)
            if response.status != health_pb2.HealthCheckResponse.SERVING:
                raise StartError("not serving")

        await _until(check, grpc.aio.AioRpcError, StartError)


async def _change(mesh: _Mesh, client: EtcdClient, number: int) -> float:
    """Close an app to all callers, and return how long the gate still lets them in."""
    app = f"app{number}"
    async with transport.channel(f"127.0.0.1:{mesh.gate_port}") as channel:
        stub = serving_pb2_grpc.ServingServiceStub(channel)
        request = serving_pb2.EvalRequest(app=app, version="none", data=[serving_pb2.Resource(body=b"x")])

        async def is_closed() -> bool:
            try:
                await stub.Eval(request, timeout=5)
            except grpc.aio.AioRpcError as error:
                return error.code() is grpc.StatusCode.UNAUTHENTICATED
            return False

        assert not await is_closed()
        await client.put(app_metadata_key(app), '{"public": false}')
        began_s = time.monotonic()
        while not await is_closed():
            if time.monotonic() - began_s > _PATIENCE_S:
                raise StartError("the gate does not follow the config")
        return time.monotonic() - began_s


async def _beat(mesh: _Mesh, heartbeats: int, seconds: float, processes: Sequence[psutil.Process]) -> list[float]:
    """Send heartbeats as instances do; return the cores that each process used meanwhile."""
    async with _channels(mesh.registry_address, heartbeats) as channels:

        async def beat(number: int) -> float:
            """Send one, and return the time in seconds to the next."""
            instance = registry_pb2.Instance(
                app="app0", version="v0", id=f"beat{number}", address="127.1.0.0:9", capacity=64
            )
            stub = registry_pb2_grpc.RegistryServiceStub(channels[number])
            response = await stub.RegisterInstance(registry_pb2.RegisterInstanceRequest(instance=instance), timeout=20)
            return response.ttl_ms / 3e3

        pause_s = await beat(0)
        for start in range(0, heartbeats, 50):
            await asyncio.gather(*map(beat, range(start, min(start + 50, heartbeats))))
        before = [sum(each.cpu_times()[:2]) for each in processes]
        began_s = time.monotonic()

        async def keep(number: int) -> None:
            due_s = began_s + number / heartbeats * pause_s
            while due_s < began_s + seconds:
                await asyncio.sleep(due_s - time.monotonic())
                await beat(number)
                due_s += pause_s

        await asyncio.gather(*map(keep, range(heartbeats)))
        passed_s = time.monotonic() - began_s
        return [(sum(each.cpu_times()[:2]) - used_s) / passed_s for each, used_s in zip(processes, before, strict=True)]


@asynccontextmanager
async def _channels(address: str, count: int) -> AsyncIterator[list[grpc.aio.Channel]]:
    # Each instance has a connection of its own. grpcio shares those with the same options.
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(count)]
    try:
        yield channels
    finally:
        await asyncio.gather(*(each.close(None) for each in channels))


async def _until(attempt: Callable[[], Awaitable[object]], *ignored: type[Exception]) -> None:
    began_s = time.monotonic()
    while True:
        try:
            await attempt()
            return
        except ignored:
            if time.monotonic() - began_s > _PATIENCE_S:
                raise
        await asyncio.sleep(0.02)


def _megabytes(process: psutil.Process) -> int:
    return round(process.memory_full_info().pss / 1e6)


async def _main(arguments: argparse.Namespace) -> None:
    figures = await measure(
        arguments.apps, arguments.versions, arguments.instances, arguments.heartbeats, arguments.seconds
    )
    for name, value in asdict(figures).items():
        print(f"{name:18}{value:>12,}")
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(figures), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--apps", type=int, default=1000)
    parser.add_argument("--versions", type=int, default=10, help="of each app (default: 10)")
    parser.add_argument("--instances", type=int, default=10, help="of each version (default: 10)")
    parser.add_argument("--heartbeats", type=int, default=2000, help="instances that send heartbeats (default: 2000)")
    parser.add_argument("--seconds", type=float, default=20, help="how long they do (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    run_until_stopped(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
