"""A host that sends no end of something, or sends it slowly, costs little: the connection breaks off soon."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from atserving.errors import InvalidArgument, ResourceUnreachable, StartError
from evaluator.fetching import download, http_fetcher
from evaluator.fetching.addresses import AddressPolicy, AllowedNetwork
from evaluator.fetching.resources import ResourceFetcher
from evaluator.fetching.sessions import CONNECTIONS
from evaluator.limits import Budget
from tests.waiting import until

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


@pytest.mark.parametrize("kind", ENDLESS)
async def test_endless_file_of_a_release_breaks_off(kind: str, tmp_path: Path) -> None:
    host = EndlessHost(*ENDLESS[kind])
    server = await asyncio.start_server(host, "127.0.0.1", 0)
    uri = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"
    with pytest.raises(StartError):
        await asyncio.wait_for(download.download(uri, tmp_path / "x", "file", None, MAX_BYTES), WAIT_S)
    await asyncio.wait_for(host.left.wait(), WAIT_S)
    assert host.sent < MOST_SENT
    server.close()


class DrippingHost:
    """Sends the start, and then one byte after the other until the fetcher breaks off."""

    def __init__(self, start: bytes, rest: bytes) -> None:
        self.left = asyncio.Event()
        self._start, self._rest = start, rest

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(self._start)
        try:
            while True:
                for at in range(len(self._rest)):
                    writer.write(self._rest[at : at + 1])
                    await writer.drain()
                    await asyncio.sleep(0.001)
        except OSError:
            pass
        finally:
            self.left.set()
            writer.close()


DRIPS = {
    "a status": (b"", b"HTTP/1.1"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"a: b\r\n"),
    "interim responses": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a chunk's size": (CHUNKED, b"0"),
    "a chunk's extension": (CHUNKED + b"1;", b"x"),
    "a body": (b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n", b"x"),
    "chunks": (CHUNKED, b"1\r\na\r\n"),
    "trailers": (CHUNKED + b"1\r\na\r\n0\r\n", b"a: b\r\n"),
}


@asynccontextmanager
async def dripping(kind: str) -> AsyncIterator[str]:
    """Yield the URL of a host that drips; in the end, the fetcher must have left it."""
    # As large as the limits allow: so no other limit than that of time ends it.
    host = DrippingHost(*(part.replace(b"1000000", b"%d" % MAX_BYTES) for part in DRIPS[kind]))
    server = await asyncio.start_server(host, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"
    await asyncio.wait_for(host.left.wait(), WAIT_S)
    server.close()


@pytest.mark.parametrize("kind", DRIPS)
async def test_drips_get_no_more_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_fetcher, "_TOTAL_S", 0.05)
    async with fetcher() as fetching, dripping(kind) as url:
        # Eight interim responses are the most.
        with pytest.raises(ResourceUnreachable, match=r"did not arrive within 0.05 s|could not be reached"):
            await asyncio.wait_for(fetching.fetch(url, Budget(1 << 30)), WAIT_S)


@pytest.mark.parametrize("kind", DRIPS)
async def test_drips_of_a_release_get_no_more_time(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_TOTAL_S", 0.05)
    async with dripping(kind) as url:
        with pytest.raises(StartError, match=r"did not arrive within 0.05 s|can't be fetched"):
            await asyncio.wait_for(download.download(url, tmp_path / "x", "file", None, MAX_BYTES), WAIT_S)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "gzip, gzip", "gzip, deflate", "br", "zstd"])
async def test_compressed_bomb_is_not_unpacked(encoding: str) -> None:
    body = bytes(64 << 20)
    for each in encoding.split(", "):
        body = zlib.compress(body) if each == "deflate" else gzip.compress(body)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\ncontent-encoding: {encoding}\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"
    async with fetcher() as fetching:
        tracemalloc.start()
        try:
            # What nobody here can unpack is no image, and small: its host may send it as it likes.
            with suppress(InvalidArgument, ResourceUnreachable):
                assert len(await fetching.fetch(url, Budget(1 << 30))) <= MAX_BYTES
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()
    server.close()


@pytest.mark.parametrize(
    "more",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison",
        b"poison",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n6\r\npoison\r\n",
    ],
)
async def test_what_a_host_sends_after_its_answer_is_no_answer(more: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nfair" + more)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"
    async with fetcher() as fetching:
        for _ in range(20):
            with suppress(ResourceUnreachable):
                assert await fetching.fetch(url, Budget(1 << 30)) == b"fair"
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


async def test_answer_that_comes_before_its_request_ends_the_connection() -> None:
    ended = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nfair")
        await fetched.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison")
        with suppress(OSError):
            assert await reader.read() == b""
        ended.set()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"
    async with fetcher() as fetching:
        for _ in range(3):
            fetched = asyncio.Event()
            ended.clear()
            assert await fetching.fetch(url, Budget(1 << 30)) == b"fair"
            fetched.set()
            await asyncio.wait_for(ended.wait(), WAIT_S)
    server.close()


async def test_idle_connections_are_bounded() -> None:
    opened = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nfair")
        opened -= 1
        writer.close()

    server = await asyncio.start_server(answer, "0.0.0.0", 0)
    port = server.sockets[0].getsockname()[1]
    async with fetcher() as fetching:
        # Each address is a host of its own.
        for number in range(CONNECTIONS + 20):
            await fetching.fetch(f"http://127.0.{number // 256}.{1 + number % 254}:{port}/x", Budget(1 << 30))
        await until(lambda: opened <= CONNECTIONS)
        assert opened >= CONNECTIONS // 2
    server.close()
