"""A gRPC server of the tests' own, over our HTTP/2, and raw connections to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from atserving.grpc_call import Call
from atserving.grpc_server import Server
from atserving.held import HeldBytes
from atserving.transport import channel
from atserving.v1 import serving_pb2
from reliability.frames import HEADERS, PREFACE, SETTINGS, field, frame
from tests.waiting import until_async

MAX_BYTES = 12 << 20
HELD_BYTES = 64 << 20
WAIT_S = 20.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

REQUEST = b"".join(
    field(name, value)
    for name, value in {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": b"/test/Wait",
        b":authority": b"test",
        b"content-type": b"application/grpc",
    }.items()
)


class Scripted:
    """Answers calls by their path."""

    def __init__(self) -> None:
        self.waiting: list[Call] = []
        self.gone = 0
        self.port = 0
        self.held = HeldBytes(HELD_BYTES)
        services = [serving_pb2.DESCRIPTOR.services_by_name["ServingService"]]
        self.server = Server(services, MAX_BYTES, self.held)
        self.server.unary("/test/Echo", lambda call: call.finish(call.message, headers=[("x-said", "yes")]))
        self.server.unary("/test/Grow", lambda call: call.finish(bytes(int(bytes(call.message)))))
        self.server.unary("/test/Fail", self._fail)
        self.server.unary("/test/Wait", self._wait)
        self.server.unary("/test/Raise", self._raise)

    @staticmethod
    def _fail(call: Call) -> None:
        deadline = call.deadline()
        call.abort(grpc.StatusCode.NOT_FOUND, f"«{call.header('x-what')}» 100 %\n", [("x-code", str(deadline is None))])

    @staticmethod
    def _raise(call: Call) -> None:
        raise RuntimeError("a bug")

    def _wait(self, call: Call) -> None:
        self.waiting.append(call)
        call.on_gone = self._left

    def _left(self) -> None:
        self.gone += 1

    async def all_waiting(self, count: int) -> None:
        async def reached() -> bool:
            return len(self.waiting) >= count

        await until_async(reached, what=f"{count} calls wait")

    async def all_gone(self, count: int) -> None:
        async def reached() -> bool:
            return self.gone >= count

        await until_async(reached, what=f"{count} calls are gone")


@asynccontextmanager
async def running() -> AsyncIterator[Scripted]:
    scripted = Scripted()
    scripted.port = await scripted.server.start("127.0.0.1:0")
    try:
        yield scripted
    finally:
        await scripted.server.stop(0)


@asynccontextmanager
async def calling() -> AsyncIterator[tuple[Scripted, grpc.aio.Channel]]:
    async with running() as scripted, channel(f"127.0.0.1:{scripted.port}") as client:
        yield scripted, client


def method(client: grpc.aio.Channel, path: str) -> Any:
    """Return a method whose messages are bytes."""
    return client.unary_unary(path, None, None)


async def failure(call: Awaitable[object]) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def conversation(port: int, *frames: bytes) -> bytes:
    """Send raw frames after the preface, and return everything until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(PREFACE + frame(SETTINGS, 0, 0) + b"".join(frames))
    said = b""
    # Closing a connection with unread data resets it.
    with suppress(ConnectionResetError):
        async with asyncio.timeout(WAIT_S):
            while more := await reader.read(1 << 16):
                said += more
    writer.close()
    return said


async def header_blocks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield the header blocks of a response up to its trailers."""
    flags = 0
    while not flags & 1:
        head = await reader.readexactly(9)
        payload = await reader.readexactly(int.from_bytes(head[:3]))
        if head[3] == HEADERS:
            flags = head[4]
            yield payload


def request(path: bytes, stream: int, end: bool = False) -> bytes:
    """Return the HEADERS of a request for a path as long as ``/test/Wait``."""
    return frame(HEADERS, 5 if end else 4, stream, REQUEST.replace(b"/test/Wait", path))


async def read_until(reader: asyncio.StreamReader, kind: int) -> None:
    """Read frames until one of a kind has come."""
    while True:
        head = await reader.readexactly(9)
        await reader.readexactly(int.from_bytes(head[:3], "big"))
        if head[3] == kind:
            return


async def connections(scripted: Scripted) -> list[Any]:
    """Return the server's connections, once one has a stream."""

    async def found() -> bool:
        return any(each._streams for each in scripted.server._connections)

    await until_async(found, what="a stream is open")
    return list(scripted.server._connections)


async def true_if(value: bool) -> bool:
    return value


async def count_frames(reader: asyncio.StreamReader, kind: int, count: int) -> None:
    for _ in range(count):
        await read_until(reader, kind)
