"""The servers under test: the mesh and its peers, each with its net."""

from __future__ import annotations

import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from atserving.errors import StartError
from atserving.local import proc
from atserving.local.child import ChildProcess
from atserving.local.examples import ROOT
from atserving.local.mesh import Mesh
from atserving.local.ports import free_ports
from bench import callers as load
from bench import machine
from bench.answer import Answer
from bench.peers.settings import FASTAPI, FASTAPI_PROCESSES, MOSEC, Settings
from bench.picture_net import PictureNetFile
from bench.workload import Workload

_START_S = 60.0
_UVICORN = ("-m", "uvicorn", "bench.peers.fastapi_server:app", "--no-access-log", "--log-level=warning", "--port")
COMMANDS: Mapping[str, Sequence[str]] = {
    MOSEC: ("-m", "bench.peers.mosec_server", "--timeout", "60000", "--port"),
    FASTAPI: _UVICORN,
    FASTAPI_PROCESSES: _UVICORN,
}


@dataclass(frozen=True)
class Case:
    """A net as all servers run it, and the right answer to its picture."""

    name: str
    workload: Workload
    file: PictureNetFile
    answer: Answer


@dataclass(frozen=True)
class Server:
    """A server that runs the net of a case."""

    case: Case
    url: str
    processes: Callable[[], Mapping[str, Sequence[int]]]
    """Returns its process ids by name."""

    def job(self, callers: int, seconds: float) -> load.Job:
        """Return the load on it."""
        return load.Job(self.url, self.case.workload.image, callers, seconds, answer=self.case.answer)

    def check(self) -> None:
        """Wait until it answers, and check the answer. Raises StartError."""
        until_s = time.monotonic() + _START_S
        head = {"content-type": "application/octet-stream"}
        request = urllib.request.Request(self.url, self.case.workload.image, head, method="POST")
        while True:
            try:
                with urllib.request.urlopen(request, timeout=_START_S) as response:
                    body = response.read()
                break
            except urllib.error.HTTPError as error:
                raise StartError(f"{self.url} answers {error.code}: {error.read()[:200]!r}") from None
            except OSError as error:
                if time.monotonic() > until_s:
                    raise StartError(f"{self.url} does not answer: {error}") from None
                time.sleep(0.05)
        if not self.case.answer.is_in(body):
            raise StartError(f"{self.url} answers {body[:200]!r}, which should be {self.case.answer}")


@asynccontextmanager
async def running_peer(name: str, case: Case, settings: Settings, folder: Path) -> AsyncIterator[Server]:
    """Run a peer, which may still be starting. It logs into a folder."""
    (port,) = free_ports(1)
    workers = ["--workers", str(settings.processes)] if name == FASTAPI_PROCESSES else []
    process = ChildProcess(
        [sys.executable, *COMMANDS[name], str(port), *workers],
        folder / f"{name}-{case.name}.log",
        cwd=ROOT,
        environment={**case.file.environment(), **settings.environment()},
    )
    process.start()
    try:
        yield Server(case, f"http://127.0.0.1:{port}/inference", lambda: _by_name(name, process.pid))
    finally:
        process.kill_session()
        await process.ended()


def _by_name(name: str, pid: int) -> dict[str, list[int]]:
    groups = {name: [pid]}
    for each in proc.descendants(pid):
        # mosec's own server is the only one that is not Python.
        is_python = "python" in Path(f"/proc/{each.pid}/exe").readlink().name
        groups.setdefault(f"{name} {'worker' if is_python else 'server'}", []).append(each.pid)
    return groups


@asynccontextmanager
async def running_mesh(cases: Sequence[Case]) -> AsyncIterator[list[Server]]:
    """Run the mesh with an evaluator for each case."""
    serves = [case.workload.example for case in cases]
    async with Mesh(serves=serves) as mesh:
        yield [
            Server(case, f"{mesh.url}/v1/eval/{example.app}", lambda: machine.mesh_processes(mesh))
            for case, example in zip(cases, serves, strict=True)
        ]
