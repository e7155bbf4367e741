"""Start etcd, a registry and an evaluator for a benchmark, on loopback ports."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from atserving import transport
from atserving.errors import StartError
from atserving.v1 import registry_pb2, registry_pb2_grpc

ROOT = Path(__file__).resolve().parents[1]
VERSION = "v1"
"""The version of every release."""

_START_S = 120.0
_POLL_S = 0.05
_STOP_S = 20.0
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")

_T = TypeVar("_T")


class Registry:
    """A running registry."""

    def __init__(self, address: str) -> None:
        self.address = address

    def publish(self, app: str, tar: Path, custom_values: Mapping[str, Any]) -> None:
        """Publish a release's tar as the only version of an app."""
        values = json.dumps(dict(custom_values))
        release = registry_pb2.Release(name=app, version=VERSION, file=tar.as_uri(), custom_values_json=values)
        self._call(lambda stub: stub.PublishRelease(registry_pb2.PublishReleaseRequest(release=release)))

    def instances(self, app: str) -> list[registry_pb2.Instance]:
        """Return the ready instances of an app."""
        found = self._call(lambda stub: stub.ListReleases(registry_pb2.ListReleasesRequest(app=app)))
        return [instance for release in found.releases for instance in release.instances]

    def _call(self, call: Callable[[registry_pb2_grpc.ReleaseServiceStub], _T]) -> _T:
        with grpc.insecure_channel(self.address, options=transport.CHANNEL_OPTIONS) as channel:
            return call(registry_pb2_grpc.ReleaseServiceStub(channel))


@dataclass(frozen=True)
class Evaluator:
    """A running evaluator that serves."""

    address: str
    pid: int
    """The process id of the front process."""
    threads: int
    """The threads of onnxruntime in each engine."""

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds so far of the front process and of the worker process."""
        children = " ".join(path.read_text() for path in Path(f"/proc/{self.pid}/task").glob("*/children"))
        (worker,) = children.split()
        return {"front": _cpu_s(self.pid), "worker": _cpu_s(int(worker))}


@contextmanager
def running_registry(folder: Path) -> Iterator[Registry]:
    """Run etcd and a registry, whose data and logs are in a folder."""
    folder.mkdir(parents=True)
    client, peer, port = _free_ports(3)
    client_url, peer_url = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
    etcd = [
        *(str(Path(sys.executable).parent / "etcd"), "--data-dir", str(folder / "data"), "--log-level", "error"),
        *("--listen-client-urls", client_url, "--advertise-client-urls", client_url),
        *("--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url),
        *("--initial-cluster", f"default={peer_url}", "--unsafe-no-fsync"),
    ]
    address = f"127.0.0.1:{port}"
    command = [sys.executable, "-m", "registry", "--etcd", f"127.0.0.1:{client}", "--listen", address]
    with _running(etcd, folder / "etcd.log"), _running(command, folder / "registry.log") as process:
        registry = Registry(address)

        def answers() -> bool:
            try:
                registry.instances("")
            except grpc.RpcError:
                return False
            return True

        _until(answers, process, folder / "registry.log")
        yield registry


@contextmanager
def running_evaluator(registry: Registry, app: str, log: Path) -> Iterator[Evaluator]:
    """Run an evaluator of a published release. It logs to a file, like in service."""
    command = [sys.executable, "-m", "evaluator", "--app", app, "--version", VERSION, "--registry", registry.address]
    with _running([*command, "--listen", "127.0.0.1:0"], log) as process:
        (instance,) = _until(lambda: registry.instances(app), process, log)
        # The plan of its worker has been logged by then.
        (threads, *_) = [fields["threads"] for fields in _logged(log) if "threads" in fields]
        yield Evaluator(instance.address, process.pid, threads)


@contextmanager
def _running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output, subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _until(condition: Callable[[], _T], process: subprocess.Popen[bytes], log: Path) -> _T:
    """Wait for the condition; return its value. Raises StartError if the process ends first."""
    deadline_s = time.monotonic() + _START_S
    while not (found := condition()):
        if process.poll() is not None or time.monotonic() > deadline_s:
            text = log.read_text(errors="replace").strip()
            raise StartError(f"{log.stem} did not start: {text or 'it logged nothing'}")
        time.sleep(_POLL_S)
    return found


def _logged(log: Path) -> Iterator[dict[str, Any]]:
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("{"):
            yield json.loads(line)


def _cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process."""
    # The name, in parentheses, may itself have blanks and parentheses.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()
