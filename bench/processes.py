"""Start etcd, a registry and an evaluator for a benchmark, on loopback ports."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atserving.config import Instance
from atserving.errors import StartError
from atserving.local import commands, proc, publishing
from atserving.local.child import ChildProcess
from atserving.local.examples import ROOT
from atserving.local.json_log import wait_logged
from atserving.local.ports import free_ports

VERSION = "v1"
"""The version of every release."""

_START_S = 120.0
_STOP_S = 20.0


@dataclass(frozen=True)
class Registry:
    """A running registry."""

    address: str

    def publish(self, app: str, tar: Path, custom_values: Mapping[str, Any]) -> None:
        """Publish a release's tar as the only version of an app. Raises StartError."""
        release = publishing.release_of(app, VERSION, tar, custom_values)
        try:
            asyncio.run(asyncio.wait_for(publishing.publish(self.address, release), _START_S))
        except TimeoutError:
            raise StartError(f"the registry at {self.address} did not answer within {_START_S:g} s") from None


@dataclass(frozen=True)
class Evaluator:
    """A running evaluator that serves."""

    instance: Instance
    pid: int
    """The process id of the front process."""
    threads: int
    """The threads of onnxruntime in each engine."""

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds so far of the front process and of the worker process."""
        worker = sum(each.cpu_s for each in proc.descendants(self.pid))
        return {"front": proc.cpu_s(self.pid), "worker": worker}


@contextmanager
def running_registry(folder: Path) -> Iterator[Registry]:
    """Run etcd and a registry, whose data and logs are in a folder. The registry may still be starting."""
    folder.mkdir(parents=True)
    client, peer, port = free_ports(3)
    peers = {"default": f"http://127.0.0.1:{peer}"}
    etcd = commands.etcd(folder / "data", f"http://127.0.0.1:{client}", peers, "--log-level", "error")
    address = f"127.0.0.1:{port}"
    registry = commands.registry([f"127.0.0.1:{client}"], address)
    with running(etcd, folder / "etcd.log"), running(registry, folder / "registry.log"):
        yield Registry(address)


@contextmanager
def running_evaluator(registry: Registry, app: str, log: Path) -> Iterator[Evaluator]:
    """Run an evaluator of a published release, once it serves. It logs to a file, like in service.

    Raises TimeoutError if it does not start.
    """
    with running(commands.evaluator(registry.address, app, VERSION), log) as process:
        registered = wait_logged(process, _START_S, "instance", "address")
        id_, address = registered["instance"], registered["address"]
        instance = Instance(app=app, version=VERSION, id=id_, address=address, capacity=1)
        threads = wait_logged(process, _START_S, "threads")["threads"]
        yield Evaluator(instance, process.pid, threads)


@contextmanager
def running(command: list[str], log: Path) -> Iterator[ChildProcess]:
    """Run a process that logs to a file. It has 20 s for its end before it is killed."""
    process = ChildProcess(command, log, cwd=ROOT)
    process.start()
    try:
        yield process
    finally:
        process.send(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except TimeoutError:
            process.kill_session()
            process.wait()
