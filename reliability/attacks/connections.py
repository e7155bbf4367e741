"""Connections that hold the mesh up: endless uploads, slow readers, floods of streams, calls by GET."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress

import orjson

from reliability.attacks.door import Door, http1
from reliability.callers import VICTIM
from reliability.frames import DATA, HEADERS, RST_STREAM, frame, http2_headers, http2_start
from reliability.report import Allowance
from reliability.scenario import Scenario, Stage
from reliability.uploads import Uploads

_COUNT = 60
_BODY_BYTES = 19 << 20
_STILL_COUNT, _STILL_BYTES, _STILL_INTERVAL_S = 150, 5 << 20, 0.03
_PART = bytes(256 << 10)
_HOLD_S = 12.0
_EVAL = "/v1/eval/digits"
_TYPED_EVAL = "/atserving.v1.ServingService/Eval"
_HEALTH = "/grpc.health.v1.Health/"
_READERS = 30
_ANSWER_MIB = 40
_CONNECTIONS, _STREAMS = 4, 500
# Three were lost at most so far, in 0.3 s. If Envoy refused others as long as it holds uploads, they would be 120.
_REFUSED = Allowance(6, "while Envoy resets the largest uploads")
_REFUSED_STILL = Allowance(40, "until Envoy ends what stands still for 5 s")
_END_STREAM = 1
_EMPTY_MESSAGE = b"\0\0\0\0\0"


async def _held(stage: Stage, work: Iterable[Awaitable[str]]) -> Counter[str]:
    """Do all the work until the time is over; return how often each thing was said. Work without end says ``held``."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        await asyncio.wait(tasks, timeout=_HOLD_S * stage.scale)
        return Counter(_said(task) if task.done() else "held" for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _said(task: asyncio.Future[str]) -> str:
    error = task.exception()
    return f"{type(error).__name__}" if error else task.result()


def _note(stage: Stage, said: Counter[str]) -> None:
    stage.note(", ".join(f"{count} {what}" for what, count in said.most_common()))


async def _upload(door: Door, size: int, delay_s: float) -> str:
    """Send a body but for its last bytes after a delay; return the status of the answer."""
    await asyncio.sleep(delay_s)
    reader, writer = await door.connect()
    try:
        writer.write(http1(_EVAL, "application/octet-stream", size + 10))
        answered = asyncio.create_task(reader.read(100))
        with suppress(ConnectionError):
            for _ in range(size // len(_PART)):
                writer.write(_PART)
                await writer.drain()
        return "answered " + (await answered)[9:12].decode()
    finally:
        writer.transport.abort()


def _uploads(count: int, size: int, interval_s: float = 0.0) -> Callable[[Stage], Awaitable[None]]:
    async def act(stage: Stage) -> None:
        door = Door(stage.mesh.edges[0])
        delays = [number * interval_s * stage.scale for number in range(count)]
        _note(stage, await _held(stage, [_upload(door, size, delay_s) for delay_s in delays]))

    return act


def _http2_uploads(path: str, content_type: str) -> Callable[[Stage], Awaitable[None]]:
    async def act(stage: Stage) -> None:
        connection = await Door(stage.mesh.edges[0]).connect()
        uploads = await Uploads.start(connection, path, content_type, _COUNT, _BODY_BYTES)
        try:
            await stage.sleep(_HOLD_S)
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                uploads.settled()
            stage.note(f"{uploads.answered} of {_COUNT} answered, {uploads.resets} reset")
        finally:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await uploads.close()

    return act


async def _read_nothing(door: Door) -> str:
    """Ask for a large answer and read no more than its first bytes."""
    reader, writer = await door.connect()
    try:
        request = {"data": {"uri": "data:a;base64,AA=="}, "params": {"do": "bytes", "mib": _ANSWER_MIB}}
        body = orjson.dumps(request)
        writer.write(http1("/v1/eval/drill", "application/json", len(body)) + body)
        status = (await reader.readexactly(12))[9:].decode()
        if status == "200":
            await asyncio.sleep(_HOLD_S * 2)
        return f"answered {status}"
    finally:
        writer.transport.abort()


async def _slow_readers(stage: Stage) -> None:
    _note(stage, await _held(stage, [_read_nothing(Door(stage.mesh.edges[0])) for _ in range(_READERS)]))


async def _watch_health(door: Door) -> str:
    """Open many streams; return how many of them have ended once the connection closes."""
    reader, writer = await door.connect()
    ended = 0
    try:
        block = http2_headers(_HEALTH + "Watch", "application/grpc")
        writer.write(http2_start())
        for number in range(_STREAMS):
            stream = 1 + 2 * number
            writer.write(frame(HEADERS, 4, stream, block) + frame(DATA, _END_STREAM, stream, _EMPTY_MESSAGE))
        while ended < _STREAMS:
            head = await reader.readexactly(9)
            await reader.readexactly(int.from_bytes(head[:3]))
            ended += head[3] == RST_STREAM or (head[3] == HEADERS and bool(head[4] & _END_STREAM))
        return f"connections with {_STREAMS} streams, all ended"
    except asyncio.IncompleteReadError:
        return f"connections closed after {ended} streams"
    finally:
        writer.transport.abort()


async def _watch_flood(stage: Stage) -> None:
    said = await _held(stage, [_watch_health(Door(stage.mesh.edges[0])) for _ in range(_CONNECTIONS)])
    _note(stage, said)


async def _gets(stage: Stage) -> None:
    """Call by GET, which a gate may take for a broken connection."""
    block = http2_headers(_HEALTH + "Check", "application/grpc", "GET")
    ejected = samples = 0
    for _ in range(20):
        _, writer = await Door(stage.mesh.edges[0]).connect()
        writer.write(http2_start() + frame(HEADERS, 4, 1, block) + frame(DATA, _END_STREAM, 1, _EMPTY_MESSAGE))
        await stage.sleep(0.3)
        writer.transport.abort()
        clusters = await stage.mesh.admin(0, "/clusters")
        samples += 1
        ejected += bool(re.search(r"^gate::.*health_flags::.*failed", clusters, re.MULTILINE))
    stage.note(f"a gate ejected in {ejected} of {samples} samples")


def connection_attacks() -> list[Scenario]:
    """Return the scenarios."""
    http2 = _http2_uploads(_EVAL, "application/octet-stream")
    typed = _http2_uploads(_TYPED_EVAL, "application/grpc")
    still = _uploads(_STILL_COUNT, _STILL_BYTES, _STILL_INTERVAL_S)
    return [
        Scenario("60 uploads without end, HTTP/1", _uploads(_COUNT, _BODY_BYTES), VICTIM, 15, allowed=_REFUSED),
        Scenario("60 uploads without end, one HTTP/2 connection", http2, VICTIM, 15, allowed=_REFUSED),
        Scenario("60 uploads without end, native gRPC", typed, VICTIM, 15, allowed=_REFUSED),
        Scenario("150 uploads of 5 MiB that stand still, HTTP/1", still, VICTIM, 15, allowed=_REFUSED_STILL),
        Scenario("30 readers of 40 MiB who do not read", _slow_readers, VICTIM, 15),
        Scenario("2,000 streams of Health/Watch", _watch_flood, VICTIM, 15),
        Scenario("calls by GET", _gets, VICTIM, 12),
    ]
