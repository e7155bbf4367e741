"""A host that sends no end of something else than a resource costs little: the connection breaks off soon."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from atserving.errors import InvalidArgument, ResourceUnreachable
from evaluator.fetching.addresses import AddressPolicy, AllowedNetwork
from evaluator.fetching.resources import ResourceFetcher
from evaluator.limits import Budget

MAX_BYTES = 100_000
# MAX_BYTES, 1 MiB of other parts, and what sockets and buffers hold.
MOST_SENT = 16 << 20
WAIT_S = 60.0

CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ENDLESS = {
    "interim responses": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "long interim responses": (b"", b"HTTP/1.1 103 Early Hints\r\nlink: " + b"x" * 5000 + b"\r\n\r\n"),
    "empty lines": (b"", b"\r\n" * 10_000),
    "a status": (b"HTTP/1.1 200 ", b"x" * 10_000),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"a: b\r\n" * 1000),
    "a header": (b"HTTP/1.1 200 OK\r\na: ", b"x" * 10_000),
    "one chunk's extension": (CHUNKED + b"1;", b"x" * 10_000),
    "chunks with extensions": (CHUNKED, b"1;" + b"x" * 4000 + b"\r\na\r\n"),
    "a chunk's size": (CHUNKED, b"0" * 10_000),
    "tiny chunks": (CHUNKED, b"1\r\na\r\n" * 1000),
    "trailers": (CHUNKED + b"1\r\na\r\n0\r\n", b"a: b\r\n" * 1000),
    "a body": (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 10_000),
}


class EndlessHost:
    """Sends the start, and then the rest again and again until the fetcher breaks off."""

    def __init__(self, start: bytes, rest: bytes) -> None:
        self.sent = 0
        self.left = asyncio.Event()
        self._start, self._rest = start, rest

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(self._start)
        try:
            while self.sent < 2 * MOST_SENT:
                writer.write(self._rest)
                self.sent += len(self._rest)
                await writer.drain()
        except OSError:
            pass
        finally:
            self.left.set()
            writer.close()


@asynccontextmanager
async def fetcher() -> AsyncIterator[ResourceFetcher]:
    async with ResourceFetcher(MAX_BYTES, AddressPolicy([AllowedNetwork.parse("127.0.0.0/8")])) as fetcher:
        yield fetcher


@pytest.mark.parametrize("kind", ENDLESS)
async def test_endless_response_breaks_off(kind: str) -> None:
    host = EndlessHost(*ENDLESS[kind])
    server = await asyncio.start_server(host, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with fetcher() as fetching:
        with pytest.raises((InvalidArgument, ResourceUnreachable)):
            await fetching.fetch(f"http://127.0.0.1:{port}/x", Budget(1 << 30))
        await asyncio.wait_for(host.left.wait(), WAIT_S)
    assert host.sent < MOST_SENT
    server.close()


async def test_connection_is_used_again_however_much_it_has_carried() -> None:
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while await reader.readline():
            await reader.readuntil(b"\r\n\r\n")
            interim = b"HTTP/1.1 102 Processing\r\n\r\n" * 3
            writer.write(interim + b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % MAX_BYTES + bytes(MAX_BYTES))
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with fetcher() as fetching:
        for _ in range(50):
            assert len(await fetching.fetch(f"http://127.0.0.1:{port}/x", Budget(1 << 30))) == MAX_BYTES
    assert connections == 1
    server.close()
