"""A gate of a test, which sends and reads what the test wants, when it wants."""

from __future__ import annotations

import asyncio
from types import TracebackType

from atserving import frames, link
from atserving.v1.evaluator_pb2 import Hello

_WAIT_S = 60.0


def piece(id_: int, payload: bytes, offset: int, total: int, kind: int = link.CALL) -> bytes:
    """Return a piece of a long frame."""
    return link.frame(frames.PIECE, frames.PIECE_HEAD.pack(id_, kind, total, offset) + payload)


class RawGate:
    """A context manager: one link to an instance."""

    def __init__(self, address: str, hello: Hello | None = None) -> None:
        """``hello`` names the instance; without it, that is a :class:`tests.instance.ScriptedInstance`."""
        self._host, _, self._port = address.rpartition(":")
        self._hello = hello or Hello(app="a", version="v", instance="i")
        self._arrived: list[link.Reply] = []
        self._frames = frames.FrameReader(self._take, frames.MAX_SHORT_BYTES, frames.MAX_BYTES)

    async def __aenter__(self) -> RawGate:
        # The stream's own buffer is small: what the gate does not read stays with the instance.
        self._reader, self._writer = await asyncio.open_connection(self._host, int(self._port), limit=1 << 16)
        await self.send(link.PREFACE + link.frame(link.HELLO, self._hello.SerializeToString()))
        await self._reader.readexactly(len(link.PREFACE))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.transport.abort()

    async def send(self, data: bytes) -> None:
        """Send bytes, as fast as the instance reads."""
        self._writer.write(data)
        async with asyncio.timeout(_WAIT_S):
            await self._writer.drain()

    async def send_call(self, id_: int, length: int, *, end: int | None = None) -> None:
        """Send a long call of ``length`` bytes in pieces, or its first ``end`` bytes."""
        payload = link.call_head(id_, 0, 0, b"", b"", length - link.CALL_HEAD.size)[link.HEAD.size :]
        payload += bytes(length - len(payload))
        for at in range(0, length if end is None else end, frames.PIECE_BYTES):
            await self.send(piece(id_, payload[at : at + frames.PIECE_BYTES][: (end or length) - at], at, length))

    async def reply(self) -> link.Reply:
        """Read until the next reply, and return it. Raises EOFError if the instance has ended the link."""
        async with asyncio.timeout(_WAIT_S):
            while not self._arrived:
                data = await self._reader.read(1 << 16)
                if not data:
                    raise EOFError
                self._frames.feed(data)
        return self._arrived.pop(0)

    def _take(self, kind: int, data: link.Buffer, start: int, end: int) -> None:
        if kind == link.REPLY:
            self._arrived.append(link.read_reply(data, start, end))
