"""The link: frames over a byte stream, between gate and instance, and between an instance and its worker.

A frame is HEAD, the payload's length and kind, and the payload. On a link between gate and instance each end first
sends the preface and a HELLO. The worker's socket has neither.
"""

from __future__ import annotations

import asyncio
import mmap
import struct
from collections.abc import Callable
from typing import NamedTuple, cast

import structlog

from atserving.wire import Buffer as Buffer

log = structlog.get_logger()

PROTOCOL = 1
MAGIC = b"ATSL"
PREFACE = MAGIC + bytes([PROTOCOL])
"""The first bytes in both directions. The first four tell a link from HTTP/2 on the same port."""

HEAD = struct.Struct("<IB")
"""The head of a frame: the length of its payload, and its kind."""

HELLO, CALL, CANCEL, REPLY, ALIVE, START, SETTINGS, AWAY = range(1, 9)
"""The kinds of frames.

- HELLO: a ``Hello`` message. The gate names the instance that it wants; the instance answers with itself, or with a
  refusal.
- CALL: :data:`CALL_HEAD`, the request's id, the traceparent, and a serialized ``InferRequest``.
- CANCEL: the ids of calls that the caller has abandoned, u64 each. An instance sends no reply to them.
- REPLY: :data:`REPLY_HEAD` and a serialized ``InferResponse``. Each call gets one reply.
- ALIVE: empty; both ends send it regularly.
- START, SETTINGS: JSON, only between an instance and its worker (:mod:`evaluator.worker.channel`).
- AWAY: one byte. 1: the instance's worker is dead or stands still, so the gate should ask others first, and the
  instance refuses calls without :data:`STAY`. 0: it serves again. A gate hears of it before any such refusal.
"""

CALL_HEAD = struct.Struct("<QQBBB")
"""The call's id, its timeout in microseconds from its arrival (0: none), flags, and the lengths of the request's id and
of the traceparent. Ids rise on a connection."""

FETCH, STAY = 1, 2
"""The flags of a call. FETCH: the instance must fetch a resource. STAY: the gate has no other instance to ask, so the
call waits while the instance is away."""

REPLY_HEAD = struct.Struct("<QBIIIIHB")
"""The call's id, the outcome, the microseconds of decode, queue, forward and postprocess, the size of the batch (0: the
request reached none), and whether the request is the first of its batch."""

RESULT, ERROR = 0, 1
"""The outcomes of a reply."""

MAX_BYTES = 64 << 20
"""The longest payload of a frame from a peer."""

MAX_TIMEOUT_US = 24 * 3600 * 10**6
"""A longer timeout of a call counts as this one."""

MOST_OPEN = 4096
"""How many calls of one connection may be open; an instance reads no more until some have their reply."""

ALIVE_S = 2.0
"""How often both ends send ALIVE."""

_MOST_SILENT = 3
"""After so many intervals in which nothing arrived, the peer counts as dead."""

# A longer frame that arrives in parts is collected in a buffer of its own size.
_LARGE = 4096
# A buffer from here on takes memory only as it fills, since its length is the word of a peer. For usual bodies it would
# cost more, a page at a time, than memory that is used again.
_MAPPED = 16 << 20
# Until a peer has named itself, its frames are short, and come soon.
_MOST_HELLO_BYTES = 4096
_HELLO_S = 10.0
_READ_BYTES = 1 << 18
_WRITE_BUFFER_BYTES = 1 << 20
_CALL = struct.Struct(HEAD.format + CALL_HEAD.format[1:])
_REPLY = struct.Struct(HEAD.format + REPLY_HEAD.format[1:])


class Malformed(Exception):  # noqa: N818
    """A peer does not keep to the protocol; the message says how."""


class Call(NamedTuple):
    """A call as it arrived."""

    id: int
    timeout_us: int
    flags: int
    reqid: bytes
    traceparent: bytes
    request: Buffer
    """A serialized ``InferRequest``."""


class Reply(NamedTuple):
    """A reply; see :data:`REPLY_HEAD`."""

    id: int
    outcome: int
    decode_us: int
    queue_us: int
    forward_us: int
    postprocess_us: int
    batch_size: int
    leads: int
    response: Buffer
    """A serialized ``InferResponse``."""


def call_head(id_: int, timeout_us: int, flags: int, reqid: bytes, traceparent: bytes, length: int) -> bytes:
    """Return the start of a CALL frame; the serialized request, of ``length`` bytes, follows."""
    size = CALL_HEAD.size + len(reqid) + len(traceparent) + length
    return _CALL.pack(size, CALL, id_, timeout_us, flags, len(reqid), len(traceparent)) + reqid + traceparent


def read_call(data: Buffer, start: int, end: int) -> Call:
    """Read the payload of a CALL frame. Raises Malformed."""
    try:
        id_, timeout_us, flags, reqid_length, trace_length = CALL_HEAD.unpack_from(data, start)
    except struct.error:
        raise Malformed("a call is too short") from None
    reqid_at = start + CALL_HEAD.size
    trace_at = reqid_at + reqid_length
    request_at = trace_at + trace_length
    if request_at > end:
        raise Malformed("a call is too short")
    return Call(
        id_,
        min(timeout_us, MAX_TIMEOUT_US),
        flags,
        bytes(data[reqid_at:trace_at]),
        bytes(data[trace_at:request_at]),
        part(data, request_at, end),
    )


def reply_head(
    id_: int,
    outcome: int,
    decode_us: int,
    queue_us: int,
    forward_us: int,
    postprocess_us: int,
    batch_size: int,
    leads: int,
    length: int,
) -> bytes:
    """Return the start of a REPLY frame; the serialized response, of ``length`` bytes, follows."""
    return _REPLY.pack(
        REPLY_HEAD.size + length,
        REPLY,
        id_,
        outcome,
        decode_us,
        queue_us,
        forward_us,
        postprocess_us,
        batch_size,
        leads,
    )


def read_reply(data: Buffer, start: int, end: int) -> Reply:
    """Read the payload of a REPLY frame. Raises Malformed."""
    response_at = start + REPLY_HEAD.size
    if response_at > end:
        raise Malformed("a reply is too short")
    return Reply._make((*REPLY_HEAD.unpack_from(data, start), part(data, response_at, end)))


def read_ids(data: Buffer, start: int, end: int) -> tuple[int, ...]:
    """Read the payload of a CANCEL frame. Raises Malformed."""
    count, rest = divmod(end - start, 8)
    if rest:
        raise Malformed("a cancellation is too short")
    return struct.unpack_from(f"<{count}Q", data, start)


def cancel_frame(ids: list[int]) -> bytes:
    """Return a CANCEL frame."""
    return HEAD.pack(8 * len(ids), CANCEL) + struct.pack(f"<{len(ids)}Q", *ids)


def away_frame(is_away: bool) -> bytes:
    """Return an AWAY frame."""
    return HEAD.pack(1, AWAY) + bytes([is_away])


def read_away(data: Buffer, start: int, end: int) -> bool:
    """Read the payload of an AWAY frame. Raises Malformed."""
    if start == end:
        raise Malformed("an AWAY is empty")
    return bool(data[start])


def frame(kind: int, payload: bytes = b"") -> bytes:
    """Return a whole frame."""
    return HEAD.pack(len(payload), kind) + payload


def part(data: Buffer, start: int, end: int) -> Buffer:
    """Return a part of what has arrived: small parts as copies, which free the rest; large ones without a copy."""
    return data[start:end] if type(data) is bytes else memoryview(data)[start:end]


Take = Callable[[int, Buffer, int, int], None]
"""Takes a frame of some kind, whose payload is ``data[start:end]``. Raises Malformed."""


class FrameReader:
    """Splits the bytes that arrive into frames, and hands each to ``take``."""

    def __init__(self, take: Take, max_bytes: int = MAX_BYTES) -> None:
        self.reads = True
        """While this is False, frames wait."""
        self.max_bytes = max_bytes
        """The longest payload to take."""
        self._take = take
        self._rest = b""
        self._large: memoryview | None = None
        self._large_kind = self._filled = 0
        self._scratch = memoryview(bytearray(_READ_BYTES))

    @property
    def partial_bytes(self) -> int:
        """How much of an incomplete frame has arrived."""
        return self._filled if self._large is not None else len(self._rest)

    def space(self) -> memoryview:
        """Return where the next bytes should be read to: the rest of a large frame goes to its place."""
        return self._scratch if self._large is None else self._large[self._filled :]

    def filled(self, count: int) -> bytes | None:
        """Take note of ``count`` bytes in the space. Return them if they still have to be fed. Raises Malformed."""
        if self._large is None:
            return bytes(self._scratch[:count])
        self._filled += count
        if self._filled == len(self._large):
            large, self._large = self._large, None
            self._take(self._large_kind, large, 0, len(large))
        return None

    def close(self) -> None:
        """Take no more, and drop an incomplete frame."""
        self.reads = False
        self._rest, self._large = b"", None

    def feed(self, data: bytes) -> None:
        """Take what has arrived; nothing, to take the frames that waited. Raises Malformed."""
        start = 0
        if self._large is not None:
            start = self._fill(data, 0)
            if start < 0:
                return
        elif self._rest:
            data = self._rest + data
            self._rest = b""
        size, head = len(data), HEAD.size
        while self.reads and size - start >= head:
            length, kind = HEAD.unpack_from(data, start)
            if length > self.max_bytes:
                raise Malformed(f"a frame of {length} bytes is longer than {self.max_bytes}")
            end = start + head + length
            if end > size:
                if length < _LARGE:
                    break
                self._large, self._large_kind, self._filled = _buffer(length), kind, 0
                self._fill(data, start + head)
                return
            self._take(kind, data, start + head, end)
            start = end
        if start < size:
            self._rest = data[start:] if start else data

    def _fill(self, data: bytes, start: int) -> int:
        """Add to the large frame. Return the end of its part of ``data``, or -1 if it is still incomplete."""
        large = self._large
        assert large is not None
        count = min(len(data) - start, len(large) - self._filled)
        large[self._filled : self._filled + count] = data[start : start + count]
        self._filled += count
        if self._filled < len(large):
            return -1
        self._large = None
        self._take(self._large_kind, large, 0, len(large))
        return start + count


def _buffer(length: int) -> memoryview:
    if length < _MAPPED:
        return memoryview(bytearray(length))
    return memoryview(mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


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
        self.reader = FrameReader(self.frame_received, max_bytes)
        self._loop = asyncio.get_running_loop()
        self._out: list[Buffer] = []
        self._flushing = False

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
        if self.transport:
            self.transport.abort()

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

    def data_received(self, data: bytes) -> None:
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
        if self.reader.reads or not self.transport or self.transport.is_closing():
            return
        self.reader.reads = True
        self.data_received(b"")
        if self.reader.reads and not self.transport.is_closing():
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True

    def send(self, *parts: Buffer) -> None:
        """Send a frame in parts, without waiting. The callers bound what they send."""
        self._out += parts
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write what was sent in this turn of the loop."""
        self._flushing = False
        if self._out and self.transport and not self.transport.is_closing():
            self.transport.writelines(self._out)
        self._out = []


class Link(FrameProtocol):
    """One end of the link between a gate and an instance: preface, heartbeats, detection of a dead peer.

    A subclass sends its HELLO itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reader.max_bytes = _MOST_HELLO_BYTES
        self._greeted = False
        self._preface = b""
        self._silent = 0
        self._unsent = 0
        self._beating: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._beating = self._loop.call_later(ALIVE_S, self._beat)
        self._patience = self._loop.call_later(_HELLO_S, self._impatient)

    def connection_lost(self, error: Exception | None) -> None:
        self._patience.cancel()
        if self._beating:
            self._beating.cancel()
        self.reader.close()

    def greet(self) -> None:
        """Take long frames from now on: the peer has named itself."""
        self._greeted = True
        self.reader.max_bytes = MAX_BYTES

    def _impatient(self) -> None:
        if not self._greeted:
            self.malformed("the peer did not begin with a HELLO")

    def data_received(self, data: bytes) -> None:
        if len(self._preface) < len(PREFACE):
            data = self._preface + data
            self._preface = data[: len(PREFACE)]
            if self._preface != PREFACE[: len(self._preface)]:
                self.other_protocol(self._preface)
                return
            data = data[len(PREFACE) :]
            if not data:
                return
        super().data_received(data)

    def other_protocol(self, preface: bytes) -> None:
        """End a connection to a peer that speaks another protocol, or another version of it."""
        self.malformed("the peer speaks another version" if preface.startswith(MAGIC) else "the peer speaks no link")

    def _beat(self) -> None:
        """Send a sign of life, and end the connection if the peer has sent none for long."""
        assert self.transport
        if self.transport.is_closing():
            return
        unsent = self.transport.get_write_buffer_size()
        # An end that does not read can't hear its peer, unless the peer itself has stopped to read.
        deaf = self.paused and self.writable
        self._silent = 0 if self.heard or deaf or 0 < unsent < self._unsent else self._silent + 1
        self.heard, self._unsent = False, unsent
        if self._silent >= _MOST_SILENT:
            self.dead()
            return
        if self.writable:
            self.send(frame(ALIVE))
        self._beating = self._loop.call_later(ALIVE_S, self._beat)

    def dead(self) -> None:
        """End the connection to a peer that no longer answers."""
        log.warning("link broken", reason="the peer has sent no sign of life")
        self.abort()
