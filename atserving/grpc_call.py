"""Unary calls of gRPC over HTTP/2, as a server sees them.

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

from __future__ import annotations

import re
import struct
import time
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from google.protobuf.message import DecodeError
from grpc import StatusCode

from atserving.held import LARGE_BYTES, HeldBytes, Share
from atserving.http2_stream import ENHANCE_YOUR_CALM, NO_HEADERS, Headers, Stream
from atserving.wire import Buffer

log = structlog.get_logger()

HEAD = struct.Struct(">BI")
"""The head of a message: whether it is compressed, and its length."""

_TIMEOUT = re.compile(rb"(\d{1,8})([HMSmun])")
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
# Envoy counts its attempts at a request, over connections that failed too.
_ATTEMPT = "x-envoy-attempt-count"
_UNQUOTED = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
# A longer message of an error would not fit into the headers that clients and proxies take.
_MOST_MESSAGE_CHARS = 1024
# Smaller parts of a body cost more as objects than as bytes.
_SMALL_BYTES = 4096
# What an open stream takes beside its message and its headers, and what a header takes beside its characters.
_STREAM_BYTES = 4 << 10
_HEADER_BYTES = 150
# Streams with more than usual leave a quarter to others, as large messages do.
_MANY_HEADER_BYTES = 16 << 10


class Call:
    """A unary call; the receiver of its stream.

    Its request counts as held by the process from its arrival until the answer, and the answer until it has left, if it
    is large or its caller does not take it at once. Its headers count if there are more than a few calls.
    """

    __slots__ = (
        "_answered",
        "_chunks",
        "_held",
        "_method",
        "_most",
        "_refused",
        "_size",
        "_stream",
        "_taken",
        "on_gone",
        "parts",
    )

    def __init__(self, stream: Stream, method: Unary, most: int, held: HeldBytes) -> None:
        self._stream = stream
        self._method = method
        self._most = most
        self._held: HeldBytes | Share = held
        self._taken = 0
        self._answered = self._refused = False
        self._chunks: list[bytes | bytearray] = []
        self._size = 0
        self.parts: list[Buffer] = []
        """The request's message, serialized, in the parts in which it arrived."""
        self.on_gone: Callable[[], None] = _nothing
        """Called if the caller leaves before the answer."""
        if held.begin():
            count = stream_bytes(stream.headers)
            if not self._take(count, large=count >= _MANY_HEADER_BYTES):
                method.full(self)

    @property
    def size(self) -> int:
        """The bytes of the request's message."""
        parts = self.parts
        return len(parts[0]) if len(parts) == 1 else sum(map(len, parts))

    @property
    def is_large(self) -> bool:
        """Whether it counts as large until its answer."""
        return self._taken >= LARGE_BYTES

    def belong_to(self, owner: str) -> bool:
        """Count a large call as one of this owner. Return False if its owner holds too much."""
        if not self.is_large or isinstance(self._held, Share):
            return True
        share = self._held.share(owner, self._taken)
        self._held = share or self._held
        return share is not None

    @property
    def message(self) -> Buffer:
        """The request's message, serialized."""
        return self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)

    def take_message(self) -> Buffer:
        """Return the request's message, and let go of it: only the caller has it now. It still counts as held."""
        message, self.parts = self.message, []
        return message

    @property
    def headers(self) -> Headers:
        """The headers of the request; none once it is answered."""
        return self._stream.headers

    @property
    def peer_names(self) -> tuple[str, ...]:
        """The URIs in the verified certificate of the peer; none without TLS."""
        return self._stream.peer_names

    @property
    def peer_address(self) -> str:
        """The address of the peer; empty if it is not known."""
        return self._stream.peer_address

    def header(self, name: str) -> str | None:
        """Return a header, or None if it is missing or no ASCII."""
        value = self._stream.headers.get(name)
        return value.decode() if value is not None and value.isascii() else None

    def deadline(self) -> float | None:
        """Return the caller's deadline in seconds of time.monotonic(), or None without one. Raises GrpcError."""
        return deadline_of(self._stream.headers)

    def received(self, data: bytes) -> None:
        if self._answered:
            return
        count = len(data)
        self._size += count
        if self._size > self._most + HEAD.size:
            self.abort(StatusCode.RESOURCE_EXHAUSTED, f"the message is larger than {self._most} bytes")
        elif not self._held.take(count, large=self._size >= LARGE_BYTES):
            self._method.full(self)
        else:
            self._taken += count
            if count >= _SMALL_BYTES or not self._chunks:
                self._chunks.append(data)
            elif isinstance(last := self._chunks[-1], bytearray) and len(last) < 1 << 16:
                last += data
            else:
                self._chunks.append(bytearray(data))

    def _take(self, count: int, *, large: bool) -> bool:
        if not self._held.take(count, large=large):
            return False
        self._taken += count
        return True

    def _give(self) -> None:
        self._held.give(self._taken)
        self._taken = 0

    def ended(self) -> None:
        if self._answered:
            return
        if self._stream.headers.get(_ATTEMPT, b"1") != b"1":
            # Envoy retries no request whose response has begun: one that kills servers meets no third.
            self._stream.proceed()
        chunks, self._chunks = self._chunks, []
        try:
            self.parts = _message(chunks, self._size)
        except GrpcError as error:
            self.abort(error.status, str(error))
            return
        try:
            self._method.handler(self)
        except Exception:
            # It must not take the connection's other calls with it.
            log.exception("call failed", path=self._stream.path)
            self.abort(StatusCode.INTERNAL, "the server failed on this call")

    def late(self) -> None:
        if not self._answered:
            self.abort(StatusCode.DEADLINE_EXCEEDED, "the request did not arrive in time")

    def gone(self) -> None:
        on_gone = self.on_gone
        self._release()
        on_gone()

    def _release(self) -> None:
        """Let go of the message, and of all that would keep it alive in a circle of references."""
        if not self._answered:
            self._answered = True
            self._held.end()
        self._chunks.clear()
        self.parts = []
        self.on_gone = _nothing
        self._give()

    def _has_room(self, count: int) -> bool:
        """Count an answer that is large, or that has to wait; return False, once, if there is no room for it."""
        large = count >= LARGE_BYTES
        if self._refused or not (large or self._stream.is_stuck) or self._take(count, large=large):
            return True
        self._refused = True
        return False

    def _hold(self, count: int) -> None:
        """Count an answer until it has left. Break it off if its caller does not take it, and there is no room."""
        stream = self._stream
        if self._taken or not stream.unsent or self._take(count + _STREAM_BYTES, large=False):
            stream.when_sent(self._give)
        else:
            stream.reset(ENHANCE_YOUR_CALM)

    def finish(self, *message: Buffer, headers: Iterable[tuple[str, str]] = ()) -> None:
        """Answer with a message, given in parts, and headers."""
        self._release()
        length = sum(map(len, message))
        if not self._has_room(length):
            self._method.full(self)
            return
        sent = Headers([("content-type", "application/grpc"), *headers])
        self._stream.respond(200, sent, b"".join((HEAD.pack(0, length), *message)), ok())
        self._stream.headers = NO_HEADERS
        if self._taken or self._stream.unsent:
            self._hold(length)

    def abort(self, status: StatusCode, message: str, trailing: Iterable[tuple[str, str]] = ()) -> None:
        """Answer with a status, in one frame (Trailers-Only)."""
        self._release()
        self._stream.start(200, failure(status, message, trailing), end=True)
        self._stream.headers = NO_HEADERS

    def respond(self, status: int, headers: Iterable[tuple[str, str]], body: bytes) -> None:
        """Answer as an HTTP server, not by gRPC: Envoy's transcoder passes such a response on unchanged."""
        self._release()
        if not self._has_room(len(body)):
            self._method.full(self)
            return
        self._stream.respond(status, Headers([*headers, ("content-length", str(len(body)))]), body)
        self._stream.headers = NO_HEADERS
        if self._taken or self._stream.unsent:
            self._hold(len(body))


def stream_bytes(headers: Headers) -> int:
    """Return about how many bytes an open stream with these headers takes."""
    characters = len(b"".join(headers.values())) + len("".join(headers.keys()))
    return _STREAM_BYTES + _HEADER_BYTES * len(headers) + characters


class GrpcError(Exception):
    """A call fails, with a status and trailing metadata."""

    def __init__(self, status: StatusCode, message: str, trailing: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.trailing = trailing


def refuse(call: Call) -> None:
    """Refuse a call for which there is no memory."""
    call.abort(StatusCode.RESOURCE_EXHAUSTED, "the server holds too many bytes")


@dataclass(frozen=True)
class Unary:
    """A unary method: what answers its calls, and what refuses those for which there is no memory."""

    handler: Callable[[Call], None]
    full: Callable[[Call], None] = refuse


def parsed(message: Any, data: Buffer) -> Any:
    """Return the message with the data. Raises GrpcError."""
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise GrpcError(StatusCode.INTERNAL, "the message is malformed") from None
    return message


def _nothing() -> None: ...


def ok() -> Headers:
    """Return the trailers of a call that succeeded."""
    return Headers([("grpc-status", "0")])


def failure(
    status: StatusCode, message: str, trailing: Iterable[tuple[str, str]] = (), *, with_type: bool = True
) -> Headers:
    """Return the trailers of a call that failed; ``with_type`` if they are its headers, too."""
    number: int = status.value[0]
    quoted = urllib.parse.quote(message[:_MOST_MESSAGE_CHARS], safe=_UNQUOTED)
    said = [("grpc-status", str(number)), ("grpc-message", quoted), *trailing]
    if status is StatusCode.UNIMPLEMENTED:
        said.append(("grpc-accept-encoding", "identity"))
    return Headers([("content-type", "application/grpc"), *said] if with_type else said)


def _message(chunks: Sequence[bytes | bytearray], size: int) -> list[Buffer]:
    """Return the only message of a body, in parts. Raises GrpcError."""
    if size < HEAD.size:
        raise GrpcError(StatusCode.INTERNAL, "the call has no message")
    first, rest = chunks[0], 1
    while len(first) < HEAD.size:
        first += chunks[rest]
        rest += 1
    flag, length = HEAD.unpack_from(first)
    if length != size - HEAD.size:
        raise GrpcError(StatusCode.INTERNAL, "the call should have one whole message")
    if flag:
        # A few bytes would unpack to a message of any size, and of any number of parts.
        raise GrpcError(StatusCode.UNIMPLEMENTED, "the message is compressed: send it as it is")
    return [memoryview(first)[HEAD.size :], *chunks[rest:]]


def deadline_of(headers: Headers) -> float | None:
    """Return the deadline of a call in seconds of time.monotonic(). Raises GrpcError."""
    value = headers.get("grpc-timeout")
    if value is None:
        return None
    found = _TIMEOUT.fullmatch(value)
    if not found:
        raise GrpcError(StatusCode.INTERNAL, "grpc-timeout is malformed")
    return time.monotonic() + int(found[1]) * _UNITS[found[2]]
