"""The link: frames (:mod:`atserving.frames`) between gate and instance, and between an instance and its worker.

On a link between gate and instance each end first sends the preface and a HELLO. Long calls and replies travel there in
pieces, in turns with others, under the call's id. The worker's socket has neither.

Gates and instances of different builds talk if they speak the same :data:`PROTOCOL`. A new optional field of ``Hello``
or of the messages of calls keeps it: older ends ignore the field, and newer ends do without it. All else raises it: a
new kind of frame or flag, another head, another meaning. The form of the preface never changes.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import NamedTuple

import structlog

from atserving.frame_protocol import FrameProtocol
from atserving.frames import HEAD as HEAD
from atserving.frames import LONG_BYTES as LONG_BYTES
from atserving.frames import MAX_BYTES, MAX_SHORT_BYTES
from atserving.frames import Malformed as Malformed
from atserving.frames import frame as frame
from atserving.frames import part as part
from atserving.v1 import evaluator_pb2
from atserving.wire import Buffer as Buffer

log = structlog.get_logger()

PROTOCOL = 2
MAGIC = b"ATSL"
PREFACE = MAGIC + bytes([PROTOCOL])
"""The first bytes in both directions. The first four tell a link from HTTP/2 on the same port."""

MOST_U32 = (1 << 32) - 1
"""The most that a field of a head may be, such as the microseconds of a stage."""

HELLO, CALL, CANCEL, REPLY, ALIVE, START, SETTINGS, AWAY, TIMES = range(1, 10)
"""The kinds of frames.

- HELLO: a ``Hello`` message. The gate names the instance that it wants; the instance answers with itself, or with a
  refusal.
- CALL: :data:`CALL_HEAD`, the request's id, the traceparent, and a serialized ``InferRequest``.
- CANCEL: the ids of calls that the caller has abandoned, u64 each. An instance sends no reply to them.
- REPLY: :data:`REPLY_HEAD` and a serialized ``InferResponse``. Each call gets one reply.
- ALIVE: empty; both ends send it regularly.
- START, SETTINGS: JSON, only between an instance and its worker (:mod:`evaluator.worker.channel`).
- TIMES: when a worker did the work of the replies that follow (:mod:`evaluator.serving.report`); only to an instance
  that traces requests.
- AWAY: one byte. 1: the instance's worker is dead or stands still, so the gate should ask others first, and the
  instance refuses calls without :data:`STAY`. 0: it serves again. A gate hears of it before any such refusal.
"""

CALL_HEAD = struct.Struct("<QQBBB")
"""The call's id, its timeout in microseconds from its arrival (0: none), flags, and the lengths of the request's id and
of the traceparent. A connection uses an id once."""

FETCH, STAY, BATCHED = 1, 2, 4
"""The flags of a call. FETCH: the instance must fetch a resource; data URIs are for its worker. STAY: the gate has no
other instance to ask, so the call waits while the instance is away. BATCHED: it is a task of a batch; those leave a
quarter of an instance to others, and only the instance knows the calls of all gates."""

REPLY_HEAD = struct.Struct("<QBIIIIHB")
"""The call's id, the outcome, the microseconds of decode, queue, forward and postprocess, the size of the batch (0: the
request reached none), and whether the request is the first of its batch."""

RESULT, ERROR = 0, 1
"""The outcomes of a reply."""

MAX_TIMEOUT_US = 24 * 3600 * 10**6
"""A longer timeout of a call counts as this one."""

MOST_OPEN = 4096
"""How many calls of one connection may be open; an instance reads no more until some have their reply."""

ALIVE_S = 0.5
"""How often an instance sends ALIVE while it has calls of a gate. Otherwise both ends send it every fourth time."""

_IDLE_TURNS = 4
_MOST_SILENT = 12
"""After so many intervals in which nothing arrived, the peer counts as dead."""

# So much a link has to send before its long frames wait, in the transport and beside it in the kernel: on a slow link,
# short frames wait for no more than that and one piece.
_WRITE_BUFFER_BYTES = 64 << 10
_UNSENT_BYTES = 128 << 10
_TCP_NOTSENT_LOWAT = 25

# Until a peer has named itself, its frames are short, and come soon.
_MOST_HELLO_BYTES = 4096
_HELLO_S = 10.0
_CALL = struct.Struct(HEAD.format + CALL_HEAD.format[1:])
_REPLY = struct.Struct(HEAD.format + REPLY_HEAD.format[1:])


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


def named(hello: evaluator_pb2.Hello) -> tuple[str, str, str, str]:
    """Return which instance a HELLO names. Only this may be compared: each end may send fields the other ignores."""
    return hello.app, hello.version, hello.instance, hello.digest


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


def with_fetch(reply: Reply, fetch_us: int) -> Reply:
    """Return a reply whose response says how long the instance has fetched. A long one is not copied for it."""
    if len(reply.response) >= LONG_BYTES:
        return reply
    # Fields of a message may come in any order.
    fetch = evaluator_pb2.InferResponse(fetch_us=min(fetch_us, MOST_U32)).SerializeToString()
    return reply._replace(response=b"".join((reply.response, fetch)))


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


class Link(FrameProtocol):
    """One end of the link between a gate and an instance: preface, heartbeats, detection of a dead peer.

    A subclass sends its HELLO itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reader.max_bytes = _MOST_HELLO_BYTES
        self._greeted = False
        self._preface = b""
        self._silent = self._turn = 0
        self._unsent = 0
        self._beating: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport
        # It resumes once all has left.
        self.transport.set_write_buffer_limits(_WRITE_BUFFER_BYTES, 0)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
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
        self.reader.max_bytes = MAX_SHORT_BYTES
        self.reader.max_long_bytes = MAX_BYTES

    def _impatient(self) -> None:
        if not self._greeted:
            self.malformed("the peer did not begin with a HELLO")

    def data_received(self, data: bytes | memoryview) -> None:
        if len(self._preface) < len(PREFACE):
            begun = self._preface + data
            self._preface = begun[: len(PREFACE)]
            if self._preface != PREFACE[: len(self._preface)]:
                self.other_protocol(self._preface)
                return
            data = begun[len(PREFACE) :]
            if not data:
                return
        super().data_received(data)

    def other_protocol(self, preface: bytes) -> None:
        """End a connection to a peer that speaks another protocol, or another version of it."""
        if preface.startswith(MAGIC):
            self.other_version(f"the peer speaks version {preface[-1]} of the link, this end version {PROTOCOL}")
        else:
            self.malformed("the peer speaks no link")

    def other_version(self, reason: str) -> None:
        """Close a connection to a peer that speaks another version; it may still read which one this end speaks."""
        log.warning("link broken", reason=reason)
        self.close()

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
        self._turn = (self._turn + 1) % _IDLE_TURNS
        if self.writable and (self.is_busy or not self._turn):
            self.send(frame(ALIVE))
        self.quiet(self._silent)
        self._beating = self._loop.call_later(ALIVE_S, self._beat)

    @property
    def is_busy(self) -> bool:
        """Whether the peer waits for this end."""
        return False

    def quiet(self, intervals: int) -> None:
        """Take note of the number of intervals in which nothing has arrived, after each one."""

    def dead(self) -> None:
        """End the connection to a peer that no longer answers."""
        log.warning("link broken", reason="the peer has sent no sign of life")
        self.abort()
