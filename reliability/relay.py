"""A way between two processes that can be cut."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType

_READ_BYTES = 1 << 16


class Relay:
    """Passes TCP connections on to one address, as an async context manager. A cut one passes nothing, and says so to
    nobody: as a network does that loses all packets.
    """

    def __init__(self, target: str) -> None:
        self._host, _, self._port = target.rpartition(":")
        self._open = asyncio.Event()
        self._open.set()
        self._ways: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        """Where it listens."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._ways:
            task.cancel()
        await asyncio.gather(*self._ways, return_exceptions=True)

    def cut(self) -> None:
        self._open.clear()

    def mend(self) -> None:
        """Pass on again what has come meanwhile, and all that follows."""
        self._open.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._open.wait()
            there = await asyncio.open_connection(self._host, int(self._port))
        except OSError:
            writer.close()
            return
        for way in (self._pass(reader, there[1]), self._pass(there[0], writer)):
            task = asyncio.create_task(way)
            self._ways.add(task)
            task.add_done_callback(self._ways.discard)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            try:
                while data := await reader.read(_READ_BYTES):
                    await self._open.wait()
                    writer.write(data)
                    await writer.drain()
            finally:
                writer.close()
