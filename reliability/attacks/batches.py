"""Batches that take more than their share: large answers, a slow host, many tasks."""

from __future__ import annotations

import asyncio
import base64
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import aiohttp
import orjson

from reliability.callers import VICTIM
from reliability.releases import PICTURES
from reliability.scenario import Scenario, Stage
from reliability.traffic import Stream

_PATIENCE_S = 60.0
# It has one instance, so that four batches ask for more than all of it.
_OF_V2 = (Stream("octets", 20, version="v2"),)
_JSON = {"content-type": "application/json"}


async def _send(session: aiohttp.ClientSession, edge: str, tasks: list[Any]) -> str:
    """Return the status of a batch, and the codes of its items."""
    async with session.post(f"{edge}/v1/batch", data=orjson.dumps(tasks), headers=_JSON) as response:
        body = await response.read()
    if response.status != 200:
        return f"{response.status} {body[:80].decode(errors='replace')}"
    codes = Counter(item["code"] for item in await asyncio.to_thread(orjson.loads, body))
    return ", ".join(f"{count} x {code or 200}" for code, count in codes.most_common())


async def _large_answers(stage: Stage) -> None:
    task = {"op": "/v1/eval/drill", "data": {"uri": "data:a;base64,AA=="}, "params": {"do": "bytes", "mib": 8}}
    began_s = time.monotonic()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(_PATIENCE_S)) as session:
        try:
            said = await _send(session, stage.mesh.edges[0], [task] * 60)
        except (aiohttp.ClientError, TimeoutError) as error:
            said = type(error).__name__
    stage.note(f"{said} in {time.monotonic() - began_s:.1f} s")


async def _drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer a request with a byte each half second."""
    with suppress(OSError, asyncio.IncompleteReadError):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.5)
    writer.transport.abort()


async def _slow_host(stage: Stage) -> None:
    tasks = [
        {"op": "/v1/eval/digits/v2", "data": {"uri": f"http://127.0.0.1:{stage.mesh.slow_port}/{number}"}}
        for number in range(200)
    ]
    server = await asyncio.start_server(_drip, "127.0.0.1", stage.mesh.slow_port)
    async with aiohttp.ClientSession() as session:
        sending = [asyncio.create_task(_send(session, stage.mesh.edges[0], tasks)) for _ in range(4)]
        await asyncio.wait(sending, timeout=18 * stage.scale)
        said = Counter("not yet answered" if not each.done() else _result(each) for each in sending)
        stage.note("; ".join(f"{count} batches: {what}" for what, count in said.items()))
        for each in sending:
            each.cancel()
        await asyncio.wait(sending)
    server.close()


async def _many_tasks(stage: Stage) -> None:
    uri = "data:image/png;base64," + base64.b64encode(PICTURES[7]).decode()
    tasks = [{"op": "/v1/eval/digits", "data": {"uri": uri}}] * 100
    until_s = time.monotonic() + 12 * stage.scale
    said: Counter[str] = Counter()

    async def send(session: aiohttp.ClientSession, edge: str) -> None:
        while time.monotonic() < until_s:
            said[await _send(session, edge, tasks)] += 1

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(_PATIENCE_S)) as session:
        results = await asyncio.gather(
            *(send(session, stage.mesh.edges[number % 2]) for number in range(8)), return_exceptions=True
        )
    for result in results:
        if result:
            said[type(result).__name__] += 1
    stage.note("; ".join(f"{count} batches: {what}" for what, count in said.most_common(3)))


def _result(task: asyncio.Task[str]) -> str:
    error = task.exception()
    return type(error).__name__ if error else task.result()


def batch_attacks() -> list[Scenario]:
    """Return the scenarios."""
    return [
        Scenario("a batch of 60 answers of 8 MiB", _large_answers, VICTIM, 15),
        Scenario("four batches with URIs of a slow host", _slow_host, _OF_V2, 22),
        Scenario("eight callers with batches of 100", _many_tasks, VICTIM, 15),
    ]
