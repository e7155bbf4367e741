"""Real processes for tests, on loopback ports: etcd, registries, evaluators, and any other program.

They end with the test process, even when that is killed.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import orjson
from grpc_health.v1 import health_pb2, health_pb2_grpc

from atserving import transport
from atserving.config import PREFIX
from atserving.local import commands
from atserving.local.child import ChildProcess
from atserving.local.examples import FOLDER, ROOT
from atserving.local.json_log import wait_logged
from atserving.local.ports import free_ports
from atserving.v1 import serving_pb2, serving_pb2_grpc
from tests.waiting import PATIENCE_S, POLL_S, until_async


class Process(ChildProcess):
    """A process of the checkout. It keeps its ports and its files from one start to the next."""

    def __init__(
        self, command: Sequence[str], log: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        """Without ``log`` the process logs to a temporary file."""
        # Removed when this object is.
        self._temporary = None if log else tempfile.NamedTemporaryFile(suffix=".log")  # noqa: SIM115
        path = log or Path(self._temporary.name if self._temporary else "")
        super().__init__(command, path, cwd=ROOT, environment=environment)

    @property
    def lines(self) -> list[str]:
        """The lines that it has logged so far."""
        return self.log_text().splitlines()

    def logged(self, *present: str, **fields: Any) -> dict[str, Any]:
        """Block until it has logged a JSON line with the fields ``present``, and ``fields`` with their values."""
        return wait_logged(self, PATIENCE_S, *present, **fields)

    def freeze(self) -> None:
        self.send(signal.SIGSTOP)

    def terminate(self) -> None:
        self.send(signal.SIGTERM)

    def wait(self, timeout_s: float | None = PATIENCE_S) -> int:
        return super().wait(timeout_s)

    def kill(self) -> None:
        """Kill it as ``kill -9`` does, and wait for its end. Without effect if it does not run."""
        if self.is_running:
            self.kill_session()
            self.wait()


class Etcd(Process):
    """One member of a cluster."""

    def __init__(
        self, directory: Path, name: str, ports: Mapping[str, tuple[int, int]], flags: Sequence[str] = ()
    ) -> None:
        """``ports`` has the ports for clients and for peers of each member."""
        self.name = name
        self.address = f"127.0.0.1:{ports[name][0]}"
        self.data = directory / name
        self.ctl_flags: list[str] = []
        self._url = f"{'https' if '--cert-file' in flags else 'http'}://{self.address}"
        self._peer_urls = {each: f"http://127.0.0.1:{peer}" for each, (_, peer) in ports.items()}
        # One member elects itself at once; several need time to hear of each other.
        heartbeat_ms, election_ms = (50, 250) if len(ports) > 1 else (10, 50)
        own = [
            *("--log-level", "error", "--unsafe-no-fsync"),
            *("--heartbeat-interval", str(heartbeat_ms), "--election-timeout", str(election_ms)),
        ]
        command = commands.etcd(self.data, self._url, self._peer_urls, *own, *flags, name=name)
        super().__init__(command, directory / f"{name}.log")

    async def ready(self) -> None:
        """Wait until the member serves."""
        await until_async(self._is_healthy, what=f"etcd {self.name} is healthy")

    async def _is_healthy(self) -> bool:
        run = await asyncio.to_thread(self._run, "endpoint", "health")
        return run.returncode == 0

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return _etcdctl(self._url, *self.ctl_flags, *arguments)

    def ctl(self, *arguments: str) -> str:
        """Run etcdctl as an operator does; return its output."""
        return _output(self._run(*arguments))

    def wipe(self) -> None:
        """Remove the data of a member that was killed."""
        shutil.rmtree(self.data)

    def restore(self, backup: Path) -> None:
        """Restore a backup that ``etcdctl snapshot save`` made, while the member is down."""
        shutil.rmtree(self.data)
        url = self._peer_urls[self.name]
        member = ["--name", self.name, "--initial-cluster", f"{self.name}={url}", "--initial-advertise-peer-urls", url]
        _output(self._run("snapshot", "restore", str(backup), "--data-dir", str(self.data), *member))


def cluster(directory: Path, names: Sequence[str], *flags: str) -> list[Etcd]:
    """Return the members of one cluster, not yet started."""
    ports = free_ports(2 * len(names))
    by_name = {name: (ports[2 * number], ports[2 * number + 1]) for number, name in enumerate(names)}
    return [Etcd(directory, name, by_name, flags) for name in names]


def etcdctl(address: str, *arguments: str) -> str:
    """Run etcdctl at a member as an operator does; return its output."""
    return _output(_etcdctl(address, *arguments))


def _etcdctl(endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(commands.BIN / "etcdctl"), "--endpoints", endpoint, *arguments]
    environment = {**os.environ, "ETCDCTL_API": "3"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE_S, check=False)


def _output(run: subprocess.CompletedProcess[str]) -> str:
    assert run.returncode == 0, run.stderr
    return run.stdout


class Registry(Process):
    """`python -m registry`, and what an operator writes into its etcd."""

    def __init__(self, directory: Path, etcd: Sequence[str], *flags: str, **environment: str) -> None:
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        self.etcd = etcd[0]
        command = commands.registry(etcd, self.address, *flags)
        super().__init__(command, directory / f"registry-{port}.log", environment)

    def wait_serving(self) -> None:
        """Block until it serves."""
        deadline_s = time.monotonic() + PATIENCE_S
        with grpc.insecure_channel(self.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="")
            while (
                stub.Check(request, wait_for_ready=True, timeout=PATIENCE_S).status
                != health_pb2.HealthCheckResponse.SERVING
            ):
                assert time.monotonic() < deadline_s, f"the registry does not serve:\n{self.log_text()}"
                time.sleep(POLL_S)

    def etcdctl(self, *arguments: str) -> str:
        return etcdctl(self.etcd, *arguments)

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Write a config key; ``key`` is what follows the prefix of all keys."""
        self.etcdctl("put", PREFIX + key, orjson.dumps(value).decode())

    def delete(self, key: str) -> None:
        self.etcdctl("del", PREFIX + key)

    def publish(self, app: str, version: str = "v1", **fields: Any) -> None:
        """Write a release, of the digits' net unless ``fields`` have another file."""
        file = (FOLDER / "digits" / "digits-v1.tar").as_uri()
        self.put(f"eval/{app}/{version}", {"name": app, "version": version, "file": file, **fields})

    def instances(self, app: str) -> list[dict[str, Any]]:
        """Return the registered instances of an app."""
        prefix = f"{PREFIX}instance/{app}/"
        return [orjson.loads(line) for line in self.etcdctl("get", "--prefix", "--print-value-only", prefix).split()]


@contextmanager
def running_registry(directory: Path, *flags: str) -> Iterator[Registry]:
    """Run a registry that serves, and its etcd."""
    directory.mkdir(exist_ok=True)
    (etcd,) = cluster(directory, ["one"])
    registry = Registry(directory, [etcd.address], *flags)
    try:
        etcd.start()
        registry.start()
        registry.wait_serving()
        yield registry
    finally:
        registry.kill()
        etcd.kill()


class Gate(Process):
    """`python -m gate`, asked over gRPC."""

    def __init__(self, registries: Sequence[str], *flags: str) -> None:
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        super().__init__(commands.gate(",".join(registries), self.address, "--drain", "0", *flags))

    async def eval(self, app: str, version: str = "") -> serving_pb2.EvalResponse:
        """Evaluate the image of a seven. Raises AioRpcError."""
        body = (FOLDER / "digits" / "images" / "7.png").read_bytes()
        request = serving_pb2.EvalRequest(app=app, version=version, data=[serving_pb2.Resource(body=body)])
        async with transport.channel(self.address) as channel:
            stub = serving_pb2_grpc.ServingServiceStub(channel)
            return await stub.Eval(request, wait_for_ready=True, timeout=PATIENCE_S)

    async def status(self, app: str, version: str = "") -> grpc.StatusCode:
        """Return the status of an eval."""
        try:
            await self.eval(app, version)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK


class Evaluator(Process):
    """`python -m evaluator`, on any free port."""

    def __init__(self, registry: str, app: str, version: str = "v1", *flags: str, **environment: str) -> None:
        self.app = app
        super().__init__(commands.evaluator(registry, app, version, *flags), environment=environment)

    def wait_serving(self) -> None:
        """Block until it is registered and serves."""
        self.logged("address", app=self.app)

    def worker(self) -> int:
        """Return the id of its worker process."""
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = stat.read_text().rpartition(")")[2].split()[1]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(parent) == self.pid:
                return int(stat.parent.name)
        raise AssertionError("the evaluator has no worker")


def start_evaluator(registry: str, app: str, version: str = "v1", *flags: str, **environment: str) -> Evaluator:
    """Start an evaluator; ``registry`` is an address."""
    process = Evaluator(registry, app, version, *flags, **environment)
    process.start()
    return process


@contextmanager
def evaluator(
    registry: Registry, app: str, version: str = "v1", *flags: str, **environment: str
) -> Iterator[Evaluator]:
    """Run an evaluator that is registered and serves."""
    process = start_evaluator(registry.address, app, version, *flags, **environment)
    try:
        process.wait_serving()
        yield process
    finally:
        process.kill()
