"""The faults of the game day: what breaks, which alert tells, and the panels where it is seen."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import orjson

from atserving.local.examples import DIGITS, FOLDER, ROOT, Example
from atserving.local.mesh import Mesh
from examples.caffe_files import write_tar
from monitoring import traffic
from monitoring.traffic import MORE, SERVES, Caller, Traffic

_PICTURE = (FOLDER / "digits" / "images" / "3.png").read_bytes()
_SLOW_S = 2.0
_NET = ROOT / "reliability" / "drill" / "net.py"


class Host:
    """A host of resources. An async context manager. It is as slow as it is told."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/3.png"
        self.delay_s = 0.0
        self._port = port
        self._answering: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Host:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self._port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for each in self._answering:
            each.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._answering.add(task)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await asyncio.sleep(self.delay_s)
                head = f"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: {len(_PICTURE)}\r\n\r\n"
                writer.write(head.encode() + _PICTURE)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            self._answering.discard(task)


@dataclass
class Stage:
    """Where the faults happen."""

    mesh: Mesh
    host: Host
    load: Traffic


@dataclass(frozen=True)
class Fault:
    """Something that breaks, and is mended."""

    name: str
    what: str
    """The fault, in the words of the table."""
    alert: str
    board: str
    panels: tuple[str, ...]
    break_it: Callable[[Stage], Awaitable[None]]
    mend_it: Callable[[Stage], Awaitable[None]]
    app: str = "digits"


def serves(folder: Path) -> list[Example]:
    """Return the releases of the game day; ``folder`` gets the one that crashes."""
    tar = folder / "drill.tar"
    write_tar(tar, {"net.py": _NET.read_bytes()})
    drill_v1 = replace(DIGITS[0], app="drill", tar=str(tar), custom_values={}, desc="crashes on demand")
    return [*SERVES[:2], *(each for each in MORE if each.app == "digits-detect"), drill_v1]


def callers(mesh: Mesh, host: Host) -> list[Caller]:
    """Return the callers of the game day: those of ``digits`` read half of their pictures from the host."""
    url = orjson.dumps({"data": {"uri": host.url}})
    return [
        traffic.picture("digits", 20),
        Caller("/v1/eval/digits", url, 20, "application/json"),
        traffic.picture("digits-detect", 8, "detect/images/1.png"),
        Caller("/v1/eval/drill", _drill("echo"), 4, "application/json"),
    ]


def _drill(do: str) -> bytes:
    return orjson.dumps({"data": {"uri": "data:a;base64,AA=="}, "params": {"do": do}})


_CRASHER = Caller("/v1/eval/drill", _drill("crash"), 0.7, "application/json")
_DETECT = "evaluator-digits-detect-v1"
_ROUTING = "app/routing/digits"


async def _kill_instance(stage: Stage) -> None:
    stage.mesh.kill_process(_DETECT)
    await stage.mesh.stop_process(_DETECT)


async def _start_instance(stage: Stage) -> None:
    stage.mesh.start_process(_DETECT)


async def _crash(stage: Stage) -> None:
    stage.load.add(_CRASHER)


async def _crash_no_more(stage: Stage) -> None:
    await stage.load.remove(_CRASHER)


async def _slow_down(stage: Stage) -> None:
    stage.host.delay_s = _SLOW_S


async def _speed_up(stage: Stage) -> None:
    stage.host.delay_s = 0


async def _stop_etcd(stage: Stage) -> None:
    await stage.mesh.stop_process("etcd")


async def _start_etcd(stage: Stage) -> None:
    stage.mesh.start_process("etcd")


async def _malform(stage: Stage) -> None:
    await traffic.put(stage.mesh, _ROUTING, "{")


async def _correct(stage: Stage) -> None:
    await traffic.delete(stage.mesh, _ROUTING)


FAULTS = (
    Fault(
        "instance",
        "the only instance of an app is killed, and stays down",
        "AtServingAppUnserved",
        "mesh",
        ("Versions unserved", "Errors by app and code", "Refusals by reason"),
        _kill_instance,
        _start_instance,
        "digits-detect",
    ),
    Fault(
        "crashes",
        "a release crashes its worker again and again",
        "AtServingWorkerRestarts",
        "app",
        ("Restarts in 1 hour", "Worker restarts in 15 minutes", "Outcomes other than 200"),
        _crash,
        _crash_no_more,
        "drill",
    ),
    Fault(
        "slow-host",
        "the host that callers' pictures come from takes 2 s",
        "AtServingLatencyBudgetFast",
        "app",
        ("p99", "Mean time by stage", "Latency at the gates"),
        _slow_down,
        _speed_up,
    ),
    Fault(
        "etcd",
        "etcd stops",
        "AtServingEtcdLost",
        "registry",
        ("Registries without etcd", "Lag of the mirror", "Calls of etcd that failed"),
        _stop_etcd,
        _start_etcd,
    ),
    Fault(
        "malformed",
        "somebody writes a malformed value into the config",
        "AtServingConfigMalformed",
        "registry",
        ("Malformed keys", "Keys", "Revisions"),
        _malform,
        _correct,
    ),
)
