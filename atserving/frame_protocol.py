"""One end of a connection that carries frames, as a protocol of asyncio."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import cast

import structlog

from atserving.frames import (
    HEAD,
    MAX_BYTES,
    PIECE,
    PIECE_BYTES,
    PIECE_HEAD,
    PIECE_START,
    FrameReader,
    Malformed,
    shared,
)
from atserving.wire import Buffer

log = structlog.get_logger()

_WRITE_BUFFER_BYTES = 4 << 20


class _Sending:
    """A long frame that leaves in pieces."""

    __slots__ = ("_offset", "_parts", "id", "kind", "left", "length")

    def __init__(self, id_: int, parts: Sequence[Buffer]) -> None:
        self.id = id_
        self.length, self.kind = HEAD.unpack_from(parts[0])
        self.left: int = self.length
        self._parts = deque(memoryview(each) for each in parts)
        self._parts[0] = self._parts[0][HEAD.size :]
        self._offset = 0

    def piece(self) -> list[Buffer]:
        """Return the next piece as a frame in parts."""
        room = min(self.left, PIECE_BYTES)
        head = PIECE_START.pack(PIECE_HEAD.size + room, PIECE, self.id, self.kind, self.length, self._offset)
        self.left -= room
        self._offset += room
        piece: list[Buffer] = [head]
        while room:
            first = self._parts.popleft()
            if len(first) > room:
                self._parts.appendleft(first[room:])
                first = first[:room]
            room -= len(first)
            piece.append(first)
        return piece


class FrameProtocol(asyncio.BufferedProtocol):
    """One end of a connection that carries frames.

    A subclass takes frames by :meth:`frame_received`, and raises Malformed there if one is wrong; the connection then
    ends. :meth:`send` gathers the frames of one turn of the loop, and writes them together.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.transport: asyncio.Transport | None = None
        self.writable = True
        """Whether the peer reads as fast as this end writes."""
        self.heard = False
        """Set with each arrival."""
        self.reader = FrameReader(self.frame_received, max_bytes, scratch=shared.scratch)
        self.long_left: Callable[[int], None] = lambda _id: None
        """Called with the id of each long frame once it has left, all but what the transport holds of it."""
        self._loop = asyncio.get_running_loop()
        self._out: list[Buffer] = []
        self._flushing = False
        self._sending: deque[_Sending] = deque()
        # The long frame of which the last piece is written, but has not left.
        self._leaving_id: int | None = None
        self._closes = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio's.
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(_WRITE_BUFFER_BYTES)

    def frame_received(self, kind: int, data: Buffer, start: int, end: int) -> None:
        """Take a frame, whose payload is ``data[start:end]``. Raises Malformed."""
        raise NotImplementedError

    def malformed(self, reason: str) -> None:
        """End the connection, since the peer sent something malformed."""
        log.warning("link broken", reason=reason)
        self.abort()

    def abort(self) -> None:
        """End the connection at once."""
        self.reader.reads = False
        self._sending.clear()
        if self.transport:
            self.transport.abort()

    def close(self) -> None:
        """Close the connection after what waits to be sent."""
        self.flush()
        self.reader.reads = False
        self._closes = True
        if self.transport:
            self.pump()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.reader.space()

    def buffer_updated(self, nbytes: int) -> None:
        self.heard = True
        try:
            data = self.reader.filled(nbytes)
        except Malformed as error:
            self.malformed(str(error))
        else:
            if data is not None:
                self.data_received(data)

    def data_received(self, data: bytes | memoryview) -> None:
        """Take what has arrived; nothing, to take the frames that waited."""
        self.heard = True
        try:
            self.reader.feed(data)
        except Malformed as error:
            self.malformed(str(error))

    @property
    def paused(self) -> bool:
        """Whether this end takes no frames for now."""
        return not self.reader.reads

    def pause(self) -> None:
        """Take no more frames for now."""
        if self.reader.reads and self.transport and not self.transport.is_closing():
            self.reader.reads = False
            self.transport.pause_reading()

    def resume(self) -> None:
        """Take frames again, first those that have already arrived."""
        if self.reader.reads or not self.transport or self.transport.is_closing() or self._closes:
            return
        self.reader.reads = True
        self.data_received(b"")
        if self.reader.reads and not self.transport.is_closing():
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        leaving, self._leaving_id = self._leaving_id, None
        if leaving is not None:
            self.long_left(leaving)
        self.pump_again()

    def pump_again(self) -> None:
        """Write what has waited until the peer reads."""
        self.pump()

    def send(self, *parts: Buffer) -> None:
        """Send a frame in parts, without waiting. The callers bound what they send."""
        self._out += parts
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self.flush)

    def send_long(self, id_: int, *parts: Buffer) -> None:
        """Send a frame in pieces, as fast as the peer reads, in turns with others."""
        self._sending.append(_Sending(id_, parts))
        if self.writable:
            self.pump()

    def drop(self, id_: int) -> None:
        """Send no more of the long frame of an id, and take no more of it."""
        self.reader.drop(id_)
        for each in self._sending:
            if each.id == id_:
                self._sending.remove(each)
                return

    @property
    def sends_long(self) -> bool:
        """Whether a long frame waits to be sent."""
        return bool(self._sending)

    @property
    def unsent_bytes(self) -> int:
        """How much waits to be sent."""
        buffered: int = self.transport.get_write_buffer_size() if self.transport else 0
        waiting: int = sum(each.left for each in self._sending)
        return buffered + waiting

    def pump(self) -> None:
        """Write pieces of the long frames, in turns, up to what the peer reads."""
        assert self.transport
        while self._sending and self.writable and not self.transport.is_closing():
            each = self._sending.popleft()
            # Before it is written: that may call pause_writing.
            piece = each.piece()
            if each.left:
                self._sending.append(each)
            self.transport.writelines(piece)
            self.piece_written(each.id, sum(map(len, piece)), each.left)
            if not each.left:
                if self.writable:
                    self.long_left(each.id)
                else:
                    self._leaving_id = each.id
        if self._closes and not self._sending:
            self.transport.close()

    def piece_written(self, id_: int, count: int, left: int) -> None:
        """Take note of a piece of ``count`` bytes that was written. ``left`` is the rest of its frame, in bytes."""

    def flush(self) -> None:
        """Write what was sent in this turn of the loop."""
        self._flushing = False
        if self._out and self.transport and not self.transport.is_closing():
            self.transport.writelines(self._out)
        self._out = []
