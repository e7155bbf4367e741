"""A mesh with load for boards and alerts: its releases, its callers, and what goes wrong on the way."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType

import aiohttp
import orjson

from atserving.admin.v1 import admin_pb2
from atserving.config import PREFIX
from atserving.local import commands, proc
from atserving.local.child import bound_to_parent
from atserving.local.examples import ALL, DIGITS, FOLDER, Example
from atserving.local.mesh import Mesh

_OCTETS = "application/octet-stream"
_TIMEOUT_S = 10.0
_ETCDCTL_S = 30.0

_V1, _V2 = DIGITS
SERVES: Sequence[Example] = (
    _V1,
    replace(_V2, phase=admin_pb2.PHASE_PRODUCTION),
    replace(_V1, version="v3", phase=admin_pb2.PHASE_STAGING, custom_values={"net": "classify", "raw_scale": 0.7}),
)
"""The app ``digits`` with two versions that share its requests, and one that is to be a shadow."""
MORE: Sequence[Example] = tuple(each for each in ALL if each.app in ("digits-detect", "digits-segment"))
"""Two apps more, for pictures."""


@dataclass(frozen=True)
class Caller:
    """Sends one kind of request at a steady rate."""

    path: str
    body: bytes
    per_s: float
    content_type: str = _OCTETS


def picture(app: str, per_s: float, image: str = "digits/images/7.png") -> Caller:
    """Return a caller that sends a picture in the body."""
    return Caller(f"/v1/eval/{app}", (FOLDER / image).read_bytes(), per_s)


def callers(mesh: Mesh, per_s: float) -> list[Caller]:
    """Return callers of ``digits``: most send pictures, some a URL, few make mistakes."""
    url = orjson.dumps({"data": {"uri": f"{mesh.files_url}/digits/images/3.png"}})
    return [
        picture("digits", 0.7 * per_s),
        Caller("/v1/eval/digits", url, 0.25 * per_s, "application/json"),
        Caller("/v1/eval/digits", b"no picture", 0.02 * per_s),
        picture("digits/no-such-version", 0.01 * per_s),
        picture("no-such-app", 0.02 * per_s),
    ]


class Traffic:
    """Callers at work. An async context manager; leaving it stops them."""

    def __init__(self, mesh: Mesh, callers: Sequence[Caller]) -> None:
        self._mesh = mesh
        self._callers = callers
        self.factor = 1.0
        """All rates are multiplied by it."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Traffic:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(_TIMEOUT_S)
        )
        self._sending = {each: asyncio.create_task(self._send_all(each)) for each in self._callers}
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [*self._sending.values(), *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    def add(self, caller: Caller) -> None:
        """Let one caller more begin."""
        self._sending[caller] = asyncio.create_task(self._send_all(caller))

    async def remove(self, caller: Caller) -> None:
        """Let a caller send no more."""
        task = self._sending.pop(caller)
        task.cancel()
        await asyncio.wait({task})

    async def _send_all(self, caller: Caller) -> None:
        while True:
            task = asyncio.create_task(self._send(caller))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(1 / (caller.per_s * self.factor))

    async def _send(self, caller: Caller) -> None:
        # A caller whose request fails goes on: the metrics tell.
        with suppress(aiohttp.ClientError, TimeoutError):
            url, headers = self._mesh.url + caller.path, {"content-type": caller.content_type}
            async with self._session.post(url, data=caller.body, headers=headers) as response:
                await response.read()


async def put(mesh: Mesh, key: str, value: str) -> None:
    """Write a key of the config, which no registry checks; ``key`` follows the prefix of all keys."""
    await _etcdctl(mesh, "put", PREFIX + key, value)


async def delete(mesh: Mesh, key: str) -> None:
    """Delete a key of the config."""
    await _etcdctl(mesh, "del", PREFIX + key)


async def shadow(mesh: Mesh, version: str) -> None:
    """Let a version of ``digits`` get copies of half of its requests."""
    await put(mesh, "app/routing/digits", orjson.dumps({"shadow": {"version": version, "percent": 50}}).decode())


def kill_worker(mesh: Mesh, evaluator: str) -> None:
    """Kill the worker of an evaluator, as a crash would."""
    for each in proc.descendants(mesh.pids()[evaluator]):
        with suppress(ProcessLookupError):
            os.kill(each.pid, signal.SIGKILL)


async def _etcdctl(mesh: Mesh, *arguments: str) -> None:
    command = [str(commands.BIN / "etcdctl"), "--endpoints", mesh.etcd, *arguments]
    process = await asyncio.create_subprocess_exec(
        *bound_to_parent(command), stdout=subprocess.DEVNULL, env={"ETCDCTL_API": "3"}
    )
    async with asyncio.timeout(_ETCDCTL_S):
        if await process.wait():
            raise OSError(f"etcdctl {' '.join(arguments)} failed")
