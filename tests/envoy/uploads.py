"""Many uploads over one HTTP/2 connection that are never finished."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from tests.envoy.rig import Edge, http2_headers, http2_start
from tests.frames import DATA, HEADERS, PING, RST_STREAM, SETTINGS, WINDOW_UPDATE, frame

_PART = bytes(16 << 10)
_INITIAL_WINDOW = 65_535
_INITIAL_WINDOW_SETTING = 4
_ACKNOWLEDGED = 1


class Uploads:
    """Sends all parts of each upload, but never its end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int, size: int) -> None:
        self.resets = 0
        self._reader = reader
        self._writer = writer
        self._left = {1 + 2 * number: size for number in range(count)}
        self._windows = dict.fromkeys(self._left, _INITIAL_WINDOW)
        self._initial = self._connection = _INITIAL_WINDOW
        self._task = asyncio.create_task(self._run())

    @classmethod
    async def start(cls, edge: Edge, path: str, content_type: str, count: int, size: int) -> Uploads:
        reader, writer = await edge.connect()
        writer.write(http2_start())
        headers = http2_headers(path, content_type)
        for number in range(count):
            writer.write(frame(HEADERS, 4, 1 + 2 * number, headers))
        return cls(reader, writer, count, size)

    def settled(self) -> bool:
        """Whether every upload has been sent or reset."""
        if self._task.done():
            self._task.result()
        return not self._left

    async def close(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._writer.transport.abort()

    async def _run(self) -> None:
        while True:
            for stream in list(self._left):
                await self._send(stream)
            head = await self._reader.readexactly(9)
            payload = await self._reader.readexactly(int.from_bytes(head[:3]))
            self._take(head[3], head[4], int.from_bytes(head[5:]), payload)

    async def _send(self, stream: int) -> None:
        while min(self._connection, self._windows[stream]) >= len(_PART):
            self._writer.write(frame(DATA, 0, stream, _PART))
            self._connection -= len(_PART)
            self._windows[stream] -= len(_PART)
            self._left[stream] -= len(_PART)
            if self._left[stream] <= 0:
                del self._left[stream]
                return
            await self._writer.drain()

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE and stream:
            self._windows[stream] += int.from_bytes(payload)
        elif kind == WINDOW_UPDATE:
            self._connection += int.from_bytes(payload)
        elif kind == RST_STREAM:
            self.resets += 1
            self._left.pop(stream, None)
        elif kind == SETTINGS and not flags & _ACKNOWLEDGED:
            self._settle(payload)
        elif kind == PING and not flags & _ACKNOWLEDGED:
            self._writer.write(frame(PING, _ACKNOWLEDGED, 0, payload))

    def _settle(self, payload: bytes) -> None:
        for at in range(0, len(payload), 6):
            if int.from_bytes(payload[at : at + 2]) == _INITIAL_WINDOW_SETTING:
                initial = int.from_bytes(payload[at + 2 : at + 6])
                for stream in self._windows:
                    self._windows[stream] += initial - self._initial
                self._initial = initial
        self._writer.write(frame(SETTINGS, _ACKNOWLEDGED, 0))
