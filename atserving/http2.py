"""HTTP/2 on the server's side, by callbacks on the event loop: no task, future or thread for a request.

Only this module and http2_stream know the HTTP/2 library. ``httpunk`` wraps hyper's ``h2``: its ``H2Streams`` holds the
whole protocol (streams, flow control, header compression, limits against hostile peers) and does no input or output.
The library's own driver runs a task and several events for each request, which costs five times as much, so this module
drives the state itself. The library does not document ``H2Streams``, so ``setup.cfg`` pins its version exactly.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import structlog
from httpunk._httpunk import (
    H2_FLAG_CAPACITY,
    H2_FLAG_CONN_DONE,
    H2_FLAG_WAKE,
    H2_HEADERS_OPENED,
    H2_HEADERS_TRAILERS,
    H2Error,
    H2FrameData,
    H2FrameGoAway,
    H2FrameHeaders,
    H2FramePing,
    H2FrameRstStream,
    H2FrameSettings,
    H2FrameStreamError,
    H2FrameWindowUpdate,
    H2StreamError,
    H2Streams,
)

from atserving.http2_stream import CANCEL, ENHANCE_YOUR_CALM, Headers, Receiver, Stream
from atserving.peer_watch import PeerWatch
from atserving.tls import peer_names

if TYPE_CHECKING:
    from httpunk._httpunk import H2Frame

log = structlog.get_logger()

PREFACE = b"PRI "
"""The first bytes of every HTTP/2 connection."""

MAX_STREAMS = 2048
"""How many requests of one connection may be open. A peer with more opens another connection, or waits."""

_PROTOCOL_ERROR = 1
# The first bytes of a TLS handshake.
_TLS_HELLO = b"\x16\x03"
_MAX_HEADER_BYTES = 64 << 10
_STREAM_WINDOW = 1 << 20
_CONNECTION_WINDOW = 16 << 20
_SEND_BUFFER_BYTES = 1 << 20
# The least that HTTP/2 allows. With larger ones a client may send one in the same bytes as its acknowledgement of them,
# and the library would refuse it: it decodes all that has arrived before it takes the acknowledgement.
_FRAME_BYTES = 16 << 10
_HANDSHAKE_S = 10.0
# The head of a HEADERS frame up to the stream's number (length 5, END_HEADERS), and its field `:status: 100`, whose
# name has number 8 in the static table (RFC 7541, section 6.2.2 and appendix A).
_CONTINUE, _STATUS_100 = b"\0\0\5\1\4", b"\x08\x03100"
# A PING frame. The bytes differ from those of the library's own, which ends a connection with one.
_PING = b"\0\0\x08\6\0\0\0\0\0atserver"
# After a step that takes longer, a connection lets others have their turn.
_LONG_S = 0.01
# So often a connection may find a request incomplete, every 2 s: after 60 to 62 s, as long as the edge waits for one.
_MOST_TURNS = 31
# In one second a peer may reset as many requests as it may have open. More is no change of mind but an attack.
_MAX_RESETS = MAX_STREAMS


Application = Callable[[Stream], Receiver]
"""Takes a request, of which only the headers have arrived, and returns its receiver."""


class Connection(asyncio.Protocol):
    """One connection of a server."""

    def __init__(self, application: Application, connections: set[Connection]) -> None:
        """``connections`` holds the connection while it is open."""
        self.state = H2Streams(
            "server",
            initial_window_size=_STREAM_WINDOW,
            connection_window=_CONNECTION_WINDOW,
            max_frame_size=_FRAME_BYTES,
            max_header_list_size=_MAX_HEADER_BYTES,
            max_send_buf_size=_SEND_BUFFER_BYTES,
            max_concurrent_streams=MAX_STREAMS,
            auto_date_header=False,
        )
        self.peer_names: tuple[str, ...] = ()
        """The URIs in the peer's verified certificate; none without TLS."""
        self._application = application
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._streams: set[Stream] = set()
        self._spare = Stream(self)
        self._reading = self._flushing = self._paused = self._draining = False
        self._peer_leaves = self._turning = False
        self._turns = 0
        self._unwritten = 0
        self._on_written: list[Callable[[], None]] = []
        self._second = self._resets = 0
        self._handshake: asyncio.TimerHandle | None = None

    @property
    def peer_address(self) -> str:
        """The address of the peer, without its port; empty if it is not known."""
        found = self._transport.get_extra_info("peername") if self._transport else None
        return str(found[0]) if found else ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self.peer_names = peer_names(transport)
        self._connections.add(self)
        self._watch = PeerWatch(
            self._transport.get_extra_info("socket"),
            owes=lambda: bool(self._streams),
            ping=self._ping,
            silent=self._peer_silent,
            turned=self._find_late,
        )
        self._handshake = self._loop.call_later(_HANDSHAKE_S, self._transport.close)
        self.state.begin()
        self._flush()

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.discard(self)
        self._transport = None
        self._watch.stop()
        self._cancel_handshake()
        self.state.fail(None, "the connection has ended")
        streams, self._streams = self._streams, set()
        for stream in streams:
            stream.drop()
            stream.receiver.gone()
        self._written()

    def data_received(self, data: bytes) -> None:
        self._reading = self._watch.heard = True
        began_s = time.monotonic()
        try:
            for frame in self.state.receive(data):
                try:
                    self._take(frame)
                except H2StreamError as error:
                    # The frame may have taken it.
                    self._spare = Stream(self)
                    stream_id, reason, initiator = error.args
                    # The rest of a request that was answered before its end may still arrive: nothing is left to reset.
                    late = type(frame) is H2FrameData and not self.state.has_stream(stream_id)
                    if initiator != "remote" and not late:
                        verdict = self.state.reset_on_error(stream_id, reason)
                        self._stopped(verdict.handle)
                        self._act(verdict.flags)
            if self._peer_leaves:
                self._act(self.state.maybe_goaway_reply())
                if self.state.goaway_replied:
                    self._loop.call_soon(self.close)
        except H2Error as error:
            reason = error.args[0] if error.args and isinstance(error.args[0], int) else _PROTOCOL_ERROR
            said = "it speaks TLS, and this port plain text" if data.startswith(_TLS_HELLO) else f"HTTP/2: {error}"
            log.warning("connection refused", reason=said)
            self.state.send_goaway(reason)
            self._write()
            self.close()
        finally:
            self._reading = False
        self._flush()
        if time.monotonic() - began_s > _LONG_S and self._transport and not self._paused:
            # libuv would go on reading while there is more. Others come first, such as pings.
            self._transport.pause_reading()
            self._loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        if self._transport and not self._paused:
            self._transport.resume_reading()

    def _take(self, frame: H2Frame) -> None:
        state = self.state
        kind = type(frame)
        if kind is H2FrameHeaders:
            self._take_headers(cast(H2FrameHeaders, frame))
        elif kind is H2FrameData:
            self._take_data(cast(H2FrameData, frame))
        elif kind is H2FrameWindowUpdate:
            for waiting in state.recv_window_update(cast(H2FrameWindowUpdate, frame)):
                cast(Stream, waiting).pump()
        elif kind is H2FrameRstStream:
            if reset := state.recv_reset(cast(H2FrameRstStream, frame)):
                stream, _, _, flags = reset
                self._stopped(stream)
                self._act(flags)
                self._count_reset()
        elif kind is H2FrameSettings:
            _, wake, flags = state.recv_settings(cast(H2FrameSettings, frame))
            self._cancel_handshake()
            for waiting in wake:
                cast(Stream, waiting).pump()
            self._act(flags)
        elif kind is H2FramePing:
            self._act(state.recv_ping(cast(H2FramePing, frame)))
            self._close_if_drained()
        elif kind is H2FrameGoAway:
            self._peer_leaves = True
            aborted, flags = state.recv_go_away(cast(H2FrameGoAway, frame))
            for stream, _ in aborted:
                self._stopped(stream)
            self._act(flags)
        elif kind is H2FrameStreamError:
            error = cast(H2FrameStreamError, frame)
            raise H2StreamError(error.stream_id, error.error_code, "library")

    def _take_headers(self, frame: H2FrameHeaders) -> None:
        stream = self._spare
        verdict = self.state.recv_headers(frame, stream)
        if verdict.kind == H2_HEADERS_OPENED:
            self._spare = Stream(self)
            stream.id = verdict.stream_id
            stream.method, stream.path, stream.headers = frame.method or "", frame.path or "", frame.headers
            self.state.accepted(stream.id)
            self._streams.add(stream)
            stream.receiver = self._application(stream)
            if verdict.eof and stream in self._streams:
                stream.receiver.ended()
        elif verdict.kind == H2_HEADERS_TRAILERS and verdict.handle in self._streams:
            verdict.handle.receiver.ended()
        if verdict.flags:
            self._act(verdict.flags)

    def _take_data(self, frame: H2FrameData) -> None:
        verdict = self.state.recv_data(frame)
        stream = cast(Stream | None, verdict.handle)
        if stream is not None:
            if (payload := verdict.payload) is not None:
                if verdict.budgeted:
                    self.state.release_data_frame(stream.id, len(payload))
                stream.receiver.received(payload)
                if stream.paused:
                    stream.hold(len(payload))
                else:
                    self._act(self.state.release_capacity(stream.id, len(payload)))
            if verdict.eof and stream in self._streams:
                stream.receiver.ended()
        if verdict.flags:
            self._act(verdict.flags)

    def _act(self, flags: int) -> None:
        """Do what the state asks for after a step."""
        if flags & H2_FLAG_WAKE:
            self._flush_soon()
        if flags & H2_FLAG_CONN_DONE:
            self._loop.call_soon(self.close)
        if flags & H2_FLAG_CAPACITY:
            # Each stream that has sent something hands the turn to the next: a loop, as they may be many.
            self._turns += 1
            while self._turns and not self._turning:
                self._turns -= 1
                self._turning = True
                if (stream := self.state.next_capacity_wake()) is not None:
                    cast(Stream, stream).pump()
                self._turning = False

    def _stopped(self, handle: object | None) -> None:
        """End a stream that the peer or the library has reset."""
        if isinstance(handle, Stream) and handle in self._streams:
            self._streams.discard(handle)
            handle.drop()
            handle.receiver.gone()
            self._close_if_drained()

    def _count_reset(self) -> None:
        second = int(self._loop.time())
        if second != self._second:
            self._second, self._resets = second, 0
        self._resets += 1
        if self._resets > _MAX_RESETS and self._transport and not self._transport.is_closing():
            log.warning("connection refused", reason=f"its peer has reset {self._resets} requests in a second")
            self.state.send_goaway(ENHANCE_YOUR_CALM)
            self.close()

    def send_continue(self, stream: Stream) -> None:
        if stream in self._streams and self._transport:
            # The library sends no such response. Behind all that it has sent, a frame of our own may follow.
            self._write()
            self._transport.write(_CONTINUE + stream.id.to_bytes(4) + _STATUS_100)

    def send_head(self, stream: Stream, status: int, headers: Headers, end: bool) -> None:
        if stream not in self._streams:
            return
        verdict = self.state.send_response_head(stream.id, status, headers, end)
        self._sent(stream, verdict.flags, stopped=verdict.stopped is not None, end=end)

    def send_data(self, stream: Stream, data: bytes, offset: int, end: bool) -> int:
        """Return the number of bytes sent, or -1 if all are."""
        if stream not in self._streams:
            stream.drop()
            return -1
        verdict = self.state.send_data(stream.id, data, offset, end)
        self._unwritten += verdict.sent
        self._sent(stream, verdict.flags, stopped=verdict.stopped is not None, end=end and verdict.done)
        return -1 if verdict.done or verdict.stopped is not None else verdict.sent

    def send_trailers(self, stream: Stream, trailers: Headers) -> None:
        if stream in self._streams:
            verdict = self.state.send_trailers(stream.id, trailers)
            self._sent(stream, verdict.flags, stopped=verdict.stopped is not None, end=True)

    def _sent(self, stream: Stream, flags: int, *, stopped: bool, end: bool) -> None:
        if end or stopped:
            self._streams.discard(stream)
            if stopped:
                stream.drop()
        if flags & H2_FLAG_CAPACITY:
            self._act(flags)
        self._flush_soon()

    @property
    def is_stuck(self) -> bool:
        """Whether there is more to send than the peer reads."""
        return self._paused or self._unwritten > _SEND_BUFFER_BYTES

    def when_written(self, callback: Callable[[], None]) -> None:
        """Call back when what was sent so far has left this process, or the connection has ended."""
        if self._transport and self.is_stuck:
            self._on_written.append(callback)
        else:
            callback()

    def _written(self) -> None:
        callbacks, self._on_written = self._on_written, []
        for callback in callbacks:
            callback()

    def reset(self, stream: Stream, reason: int) -> None:
        if stream in self._streams:
            self._streams.discard(stream)
            self._act(self.state.reset_stream(stream.id, reason, "user").flags)
            self._flush_soon()

    def release(self, stream: Stream, count: int) -> None:
        if stream in self._streams:
            self._act(self.state.release_capacity(stream.id, count))

    def receivers(self) -> list[Receiver]:
        """Return what receives the requests in flight."""
        return [stream.receiver for stream in self._streams]

    def drain(self) -> None:
        """Take no more requests, and close once those in flight are answered."""
        self._draining = True
        self._act(self.state.begin_graceful_shutdown())
        self._flush_soon()

    def close(self) -> None:
        """Break off the requests in flight, and close."""
        for stream in list(self._streams):
            self.reset(stream, CANCEL)
            stream.drop()
            stream.receiver.gone()
        self._write()
        if self._transport:
            self._transport.close()

    def _close_if_drained(self) -> None:
        if self._draining and self.state.shutdown_final and not self._streams and self._transport:
            self._write()
            self._transport.close()

    def _flush_soon(self) -> None:
        if not self._flushing and not self._reading:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._paused or self._transport is None:
            return
        self._write()
        if self._on_written and not self.is_stuck:
            self._written()
        if self.state.has_pending():
            self._flush_soon()
        elif self._draining:
            self._close_if_drained()

    def _write(self) -> None:
        """Write all pending frames, and let streams refill the buffer that this has emptied."""
        pending, _ = self.state.take_pending()
        self._unwritten = 0
        if pending and self._transport:
            # The transport keeps what it can't write at once, but the state needs its buffer back.
            self._transport.write(bytes(pending))
        pending.release()
        for stream in self.state.credit_written():
            cast(Stream, stream).pump()

    def _ping(self) -> None:
        if self._transport:
            # The library sends no pings. It takes their acknowledgements, and ignores them.
            self._write()
            self._transport.write(_PING)

    def _peer_silent(self) -> None:
        if self._transport:
            log.warning("caller lost", reason="it does not answer pings", in_flight=len(self._streams))
            self._transport.abort()

    def _find_late(self) -> None:
        """Tell those who receive requests that need too long to arrive."""
        for stream in list(self._streams):
            if not self.state.is_recv_end_stream(stream.id):
                stream.turns += 1
                if stream.turns == _MOST_TURNS:
                    stream.receiver.late()

    def pause_writing(self) -> None:
        # A peer that does not read gets no more work done: frames that need an answer would pile up here.
        self._paused = True
        if self._transport:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        if self._transport:
            self._transport.resume_reading()
        self._flush()

    def _cancel_handshake(self) -> None:
        if self._handshake:
            self._handshake.cancel()
            self._handshake = None
