"""The real Envoy with the edge's bootstrap, in front of fake gates, and raw callers of it."""

from __future__ import annotations

import asyncio
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import orjson
import yaml

from atserving.local import commands, envoy
from atserving.local.envoy_tracing import Export
from atserving.local.examples import ROOT
from atserving.local.ports import Ports
from tests.pod_memory import PodMemory
from tests.processes import Process
from tests.waiting import PATIENCE_S, until_async

EVAL = "/v1/eval/digits"
TYPED_EVAL = "/atserving.v1.ServingService/Eval"


class Edge:
    """An async context manager: entering starts Envoy and the gates, and waits until every gate is healthy."""

    def __init__(
        self,
        gates: int = 1,
        change: Callable[[Any], None] | None = None,
        memory: PodMemory | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """``change`` may change the bootstrap: a test shortens a time with it. ``memory`` bounds that of Envoy.

        ``environment`` is added to Envoy's, and may switch tracing on.
        """
        self.ports = Ports.free(gates=gates)
        self.url = f"http://127.0.0.1:{self.ports.edge}"
        self.gates = [Process([sys.executable, "-m", "tests.envoy.fake_gate", str(port)]) for port in self.ports.gates]
        self._folder = tempfile.TemporaryDirectory(prefix="atserving-")
        path = Path(self._folder.name) / "envoy.yaml"
        self._admin = f"{self._folder.name}/{envoy.ADMIN_SOCKET}"
        export = Export.from_environment(environment or {})
        local = envoy.local_bootstrap(ROOT / "envoy", self.ports, export=export)
        bootstrap = yaml.safe_load(local.replace(envoy.ADMIN_SOCKET, self._admin))
        _answer_every_host(bootstrap)
        if change:
            change(bootstrap)
        path.write_text(yaml.safe_dump(bootstrap))
        # A line of its log is written at once.
        command = commands.envoy(path, "--file-flush-interval-msec", "20")
        self.envoy = Process(memory.command(command) if memory else command, environment=environment)

    async def __aenter__(self) -> Edge:
        for process in (*self.gates, self.envoy):
            process.start()
        try:
            await self.all_healthy()
        except BaseException:
            self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        for process in (self.envoy, *self.gates):
            process.kill()
        self._folder.cleanup()

    async def all_healthy(self) -> None:
        """Wait until Envoy considers every gate healthy."""

        async def healthy() -> bool:
            clusters = await self.admin("/clusters")
            return len(re.findall(r"^gate::.*::health_flags::healthy$", clusters, re.MULTILINE)) == len(self.gates)

        await until_async(healthy, aiohttp.ClientError, what="every gate is healthy")

    async def admin(self, path: str) -> str:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(self._admin)) as session,
            session.get(f"http://envoy{path}") as response,
        ):
            return await response.text()

    async def stat(self, name: str) -> int:
        """Return one of Envoy's counters or gauges."""
        found = re.search(rf"^{re.escape(name)}: (\d+)$", await self.admin("/stats"), re.MULTILINE)
        return int(found[1]) if found else 0

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.ports.edge)

    async def raw(self, request: bytes) -> bytes:
        """Send bytes on a connection of their own; return all that comes until Envoy closes it."""
        reader, writer = await self.connect()
        try:
            writer.write(request)
            async with asyncio.timeout(PATIENCE_S):
                return await reader.read()
        finally:
            writer.close()

    async def ask(self, body: bytes = b"x") -> tuple[int, dict[str, Any]]:
        """Send an eval on a connection of its own; return the status and the body."""
        answer = await self.raw(eval_request(body))
        return int(answer.split()[1]), orjson.loads(answer.partition(b"\r\n\r\n")[2])


def _answer_every_host(bootstrap: Any) -> None:
    """Undo what the local mesh does against web pages."""
    for listener in bootstrap["static_resources"]["listeners"]:
        for each in listener["filter_chains"][0]["filters"]:
            routes = each["typed_config"]["route_config"]
            routes["virtual_hosts"] = [host for host in routes["virtual_hosts"] if host["name"] != "others"]
            routes["virtual_hosts"][0]["domains"] = ["*"]


def eval_request(body: bytes = b"x", *lines: str, version: str = "1.1", missing: int = 0) -> bytes:
    """Return an eval by HTTP/1 with more header lines. Its body lacks the last ``missing`` bytes."""
    head = [
        f"POST {EVAL} HTTP/{version}",
        *("host: localhost", "connection: close", "content-type: application/octet-stream"),
        f"content-length: {len(body) + missing}",
        *lines,
    ]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body
