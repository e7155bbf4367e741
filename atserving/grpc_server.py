"""gRPC over HTTP/2 on the server's side, by callbacks, with the standard health service and reflection.

It takes the place of ``grpc.aio.server``, which hands each request from its own thread to the event loop and back: that
costs ten times as much as the protocol. Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

from __future__ import annotations

import asyncio
import re
import struct
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

from atserving import http2
from atserving.held import LARGE_BYTES, HeldBytes
from atserving.http2 import Headers, Stream
from atserving.sockets import listening_socket
from atserving.transport import LIVE, MAX_MESSAGE_BYTES
from atserving.wire import Buffer

log = structlog.get_logger()

_HEAD = struct.Struct(">BI")
_CONTENT_TYPE = b"application/grpc"
_TIMEOUT = re.compile(rb"(\d{1,8})([HMSmun])")
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
# Envoy counts its attempts at a request, over connections that failed too.
_ATTEMPT = "x-envoy-attempt-count"
_UNQUOTED = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
_SHORT_BYTES = 1 << 10
# A longer message of an error would not fit into the headers that clients and proxies take.
_MOST_MESSAGE_CHARS = 1024
# Smaller parts of a body cost more as objects than as bytes.
_SMALL_BYTES = 4096
# What an open stream takes beside its message.
_STREAM_BYTES = 4 << 10
# The bound of a server that is given none.
_MOST_HELD_BYTES = 256 << 20
# A streaming call waits while its peer has not taken so many messages.
_MOST_UNSENT = 64
# After so long a stopping server waits for calls only, no longer for connections and streams.
_PARTING_S = 1.0


class Call:
    """A unary call; the receiver of its stream.

    Its request counts as held by the process from its arrival until the answer, and the answer until it has left, if it
    is large or its caller does not take it at once.
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
        self._held = held
        self._taken = 0
        self._answered = self._refused = False
        self._chunks: list[bytes | bytearray] = []
        self._size = 0
        self.parts: list[Buffer] = []
        """The request's message, serialized, in the parts in which it arrived."""
        self.on_gone: Callable[[], None] = _nothing
        """Called if the caller leaves before the answer."""

    @property
    def size(self) -> int:
        """The bytes of the request's message."""
        return sum(map(len, self.parts))

    @property
    def message(self) -> Buffer:
        """The request's message, serialized."""
        return self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)

    def take_message(self) -> Buffer:
        """Return the request's message, and let go of it: only the caller has it now. It still counts as held."""
        message, self.parts = self.message, []
        return message

    def header(self, name: str) -> str | None:
        """Return a header, or None if it is missing or no ASCII."""
        value = self._stream.headers.get(name)
        return value.decode() if value is not None and value.isascii() else None

    def deadline(self) -> float | None:
        """Return the caller's deadline in seconds of time.monotonic(), or None without one. Raises GrpcError."""
        return _deadline(self._stream.headers)

    def received(self, data: bytes) -> None:
        if self._answered:
            return
        count = len(data)
        self._size += count
        if self._size > self._most + _HEAD.size:
            self.abort(StatusCode.RESOURCE_EXHAUSTED, f"the message is larger than {self._most} bytes")
        elif not self._take(count, large=self._size >= LARGE_BYTES):
            self._method.full(self)
        elif count >= _SMALL_BYTES or not self._chunks:
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

    def gone(self) -> None:
        on_gone = self.on_gone
        self._release()
        on_gone()

    def _release(self) -> None:
        """Let go of the message, and of all that would keep it alive in a circle of references."""
        self._answered = True
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
            stream.reset(http2.ENHANCE_YOUR_CALM)

    def finish(self, *message: Buffer, headers: Iterable[tuple[str, str]] = ()) -> None:
        """Answer with a message, given in parts, and headers."""
        self._release()
        length = sum(map(len, message))
        if not self._has_room(length):
            self._method.full(self)
            return
        sent = Headers([("content-type", "application/grpc"), *headers])
        self._stream.respond(200, sent, b"".join((_HEAD.pack(0, length), *message)), _ok())
        if self._taken or self._stream.unsent:
            self._hold(length)

    def abort(self, status: StatusCode, message: str, trailing: Iterable[tuple[str, str]] = ()) -> None:
        """Answer with a status, in one frame (Trailers-Only)."""
        self._release()
        self._stream.start(200, _failure(status, message, trailing), end=True)

    def respond(self, status: int, headers: Iterable[tuple[str, str]], body: bytes) -> None:
        """Answer as an HTTP server, not by gRPC: Envoy's transcoder passes such a response on unchanged."""
        self._release()
        if not self._has_room(len(body)):
            self._method.full(self)
            return
        self._stream.respond(status, Headers([*headers, ("content-length", str(len(body)))]), body)
        if self._taken or self._stream.unsent:
            self._hold(len(body))


class GrpcError(Exception):
    """A call fails before its handler sees it."""

    def __init__(self, status: StatusCode, message: str) -> None:
        super().__init__(message)
        self.status = status


def _full(call: Call) -> None:
    call.abort(StatusCode.RESOURCE_EXHAUSTED, "the server holds too many bytes")


@dataclass(frozen=True)
class Unary:
    """A unary method: what answers its calls, and what refuses those for which there is no memory."""

    handler: Callable[[Call], None]
    full: Callable[[Call], None] = _full


Streaming = Callable[[AsyncIterator[bytes]], AsyncIterator[bytes]]


class _StreamingCall:
    """A streaming call, which runs in a task."""

    def __init__(self, stream: Stream, handler: Streaming, most: int) -> None:
        self._stream = stream
        self._handler = handler
        self._most = most
        self._data = bytearray()
        self._started = False
        self._messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._sent = asyncio.Event()
        stream.on_sent = self._sent.set
        self._task = asyncio.get_running_loop().create_task(self._run())

    def received(self, data: bytes) -> None:
        self._data += data
        while len(self._data) >= _HEAD.size:
            flag, length = _HEAD.unpack_from(self._data)
            if flag or length > self._most:
                self._task.cancel()
                status = StatusCode.UNIMPLEMENTED if flag else StatusCode.RESOURCE_EXHAUSTED
                self._stream.start(200, _failure(status, "the message is compressed or too large"), end=True)
                return
            if len(self._data) < _HEAD.size + length:
                break
            self._messages.put_nowait(bytes(self._data[_HEAD.size : _HEAD.size + length]))
            del self._data[: _HEAD.size + length]
            # The peer waits with more until this one is taken.
            self._stream.paused = True

    def ended(self) -> None:
        self._messages.put_nowait(None)

    def gone(self) -> None:
        self._task.cancel()

    def stop(self) -> None:
        """End the call, since the server stops."""
        self._task.cancel()
        self._end(GrpcError(StatusCode.UNAVAILABLE, "the server is stopping"))

    async def _requests(self) -> AsyncIterator[bytes]:
        while (message := await self._messages.get()) is not None:
            if self._messages.empty():
                self._stream.resume()
            yield message

    async def _run(self) -> None:
        try:
            async for message in self._handler(self._requests()):
                self._start()
                self._stream.send(_HEAD.pack(0, len(message)) + message)
                while self._stream.unsent > _MOST_UNSENT:
                    self._sent.clear()
                    await self._sent.wait()
        except GrpcError as error:
            self._end(error)
        except Exception:
            log.exception("call failed", path=self._stream.path)
            self._end(GrpcError(StatusCode.INTERNAL, "the server failed on this call"))
        else:
            self._start()
            self._stream.end(_ok())

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._stream.start(200, Headers([("content-type", "application/grpc")]))

    def _end(self, error: GrpcError) -> None:
        trailers = _failure(error.status, str(error), with_type=not self._started)
        if self._started:
            self._stream.end(trailers)
        else:
            self._stream.start(200, trailers, end=True)


class _Refused:
    """Receives what is left of a request that is answered already."""

    def received(self, data: bytes) -> None: ...

    def ended(self) -> None: ...

    def gone(self) -> None: ...


class Server:
    """A gRPC server with the standard health service and reflection.

    The health of every service is NOT_SERVING until :meth:`set_serving`; ``LIVE`` is SERVING from the start. The server
    rejects a message larger than ``max_receive_bytes`` with RESOURCE_EXHAUSTED, and a compressed one with
    UNIMPLEMENTED. Reflection shows ``services`` and the files they need, and leaves out those in ``internal``.
    """

    def __init__(
        self,
        services: Sequence[ServiceDescriptor],
        max_receive_bytes: int = MAX_MESSAGE_BYTES,
        held: HeldBytes | None = None,
        *,
        internal: Sequence[ServiceDescriptor] = (),
    ) -> None:
        """``held`` bounds the bytes of all calls together. Reflection does not show the ``internal`` services."""
        self._most = max_receive_bytes
        self._held = held or HeldBytes(_MOST_HELD_BYTES)
        self._unary: dict[str, Unary] = {}
        self._streaming: dict[str, Streaming] = {}
        self._connections: set[http2.Connection] = set()
        self._server: asyncio.Server | None = None
        self._serving = self._stopping = False
        self._names = ["", *(service.full_name for service in (*services, *internal))]
        self._changed = asyncio.Event()
        health = health_pb2.DESCRIPTOR.services_by_name["Health"]
        self.unary(f"/{health.full_name}/Check", self._check)
        self._streaming[f"/{health.full_name}/Watch"] = self._watch
        shown = [*services, health, reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]]
        names = [service.full_name for service in shown]
        self._reflection = ReflectionServicer(names, pool=_pool([service.file for service in shown]))
        self._streaming[f"/{reflection.SERVICE_NAME}/ServerReflectionInfo"] = self._reflect

    def unary(self, path: str, handler: Callable[[Call], None], full: Callable[[Call], None] = _full) -> None:
        """Let ``handler`` answer the calls of a path, ``/<service>/<method>``, at once or later.

        ``full`` refuses a call whose request or answer does not fit into what the server may hold.
        """
        self._unary[path] = Unary(handler, full)

    async def start(self, listen: str) -> int:
        """Listen on ``host:port`` (port 0: any free port) and return the port. Raises StartError."""
        own = await listening_socket(listen)
        self._server = await asyncio.get_running_loop().create_server(self.connect, sock=own)
        return int(own.getsockname()[1])

    def connect(self) -> http2.Connection:
        """Return the protocol of a new connection, for a listener of the caller's own."""
        return http2.Connection(self._open, self._connections)

    async def set_serving(self, serving: bool) -> None:
        """Report by the health service whether this server accepts calls."""
        self._serving = serving
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def stop(self, grace_s: float) -> None:
        """Accept no new calls, let the calls in flight finish within ``grace_s``, and cancel the rest."""
        if self._server:
            self._server.close()
        self._stopping = True
        await self.set_serving(False)
        for connection in list(self._connections):
            connection.drain()
        began_s = time.monotonic()
        parted = False
        while self._connections and time.monotonic() < began_s + grace_s:
            await asyncio.sleep(0.02)
            if not parted and time.monotonic() >= began_s + _PARTING_S:
                parted = True
                self._part()
        for connection in list(self._connections):
            connection.close()

    def _part(self) -> None:
        """End what is open but no call: streams that only listen, and connections whose peers do not close them."""
        for connection in list(self._connections):
            for receiver in connection.receivers():
                if isinstance(receiver, _StreamingCall):
                    receiver.stop()
            if not connection.receivers():
                connection.close()

    def _open(self, stream: Stream) -> http2.Receiver:
        refusal: Headers | None = None
        if stream.method != "POST":
            stream.start(405, Headers([("allow", "POST")]), end=True)
            return _Refused()
        if not (stream.headers.get("content-type") or b"").startswith(_CONTENT_TYPE):
            stream.start(415, Headers([("accept", "application/grpc")]), end=True)
            return _Refused()
        if method := self._unary.get(stream.path):
            return Call(stream, method, self._most, self._held)
        if streaming := self._streaming.get(stream.path):
            return _StreamingCall(stream, streaming, _SHORT_BYTES)
        refusal = _failure(StatusCode.UNIMPLEMENTED, "unknown method")
        stream.start(200, refusal, end=True)
        return _Refused()

    def _status(self, service: str) -> health_pb2.HealthCheckResponse:
        kinds = health_pb2.HealthCheckResponse
        if service == LIVE:
            return kinds(status=kinds.SERVING)
        if service not in self._names:
            raise GrpcError(StatusCode.NOT_FOUND, "unknown service")
        return kinds(status=kinds.SERVING if self._serving else kinds.NOT_SERVING)

    def _check(self, call: Call) -> None:
        try:
            service = parsed(health_pb2.HealthCheckRequest(), call.message).service
            call.finish(self._status(service).SerializeToString())
        except GrpcError as error:
            call.abort(error.status, str(error))

    async def _watch(self, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for message in messages:
            service = parsed(health_pb2.HealthCheckRequest(), message).service
            last: bytes | None = None
            while True:
                changed = self._changed
                try:
                    status = self._status(service)
                except GrpcError:
                    status = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
                if (now := status.SerializeToString()) != last:
                    last = now
                    yield now
                if self._stopping:
                    return
                await changed.wait()

    async def _reflect(self, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async def requests() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            async for message in messages:
                yield parsed(reflection_pb2.ServerReflectionRequest(), message)

        async for response in self._reflection.ServerReflectionInfo(requests(), None):
            yield response.SerializeToString()


def _pool(files: Iterable[FileDescriptor]) -> DescriptorPool:
    """Return a pool of the files and of those they need. The process's own pool has every file that it has loaded."""
    pool = DescriptorPool()
    added: set[str] = set()

    def add(file: FileDescriptor) -> None:
        if file.name not in added:
            added.add(file.name)
            for needed in file.dependencies:
                add(needed)
            pool.AddSerializedFile(file.serialized_pb)

    for file in files:
        add(file)
    return pool


def parsed(message: Any, data: Buffer) -> Any:
    """Return the message with the data. Raises GrpcError."""
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise GrpcError(StatusCode.INTERNAL, "the message is malformed") from None
    return message


def _nothing() -> None: ...


def _ok() -> Headers:
    return Headers([("grpc-status", "0")])


def _failure(
    status: StatusCode, message: str, trailing: Iterable[tuple[str, str]] = (), *, with_type: bool = True
) -> Headers:
    number: int = status.value[0]
    quoted = urllib.parse.quote(message[:_MOST_MESSAGE_CHARS], safe=_UNQUOTED)
    said = [("grpc-status", str(number)), ("grpc-message", quoted), *trailing]
    if status is StatusCode.UNIMPLEMENTED:
        said.append(("grpc-accept-encoding", "identity"))
    return Headers([("content-type", "application/grpc"), *said] if with_type else said)


def _message(chunks: Sequence[bytes | bytearray], size: int) -> list[Buffer]:
    """Return the only message of a body, in parts. Raises GrpcError."""
    if size < _HEAD.size:
        raise GrpcError(StatusCode.INTERNAL, "the call has no message")
    if len(chunks[0]) < _HEAD.size:
        chunks = [b"".join(chunks)]
    flag, length = _HEAD.unpack_from(chunks[0])
    if length != size - _HEAD.size:
        raise GrpcError(StatusCode.INTERNAL, "the call should have one whole message")
    if flag:
        # A few bytes would unpack to a message of any size, and of any number of parts.
        raise GrpcError(StatusCode.UNIMPLEMENTED, "the message is compressed: send it as it is")
    return [memoryview(chunks[0])[_HEAD.size :], *chunks[1:]]


def _deadline(headers: Headers) -> float | None:
    """Return the deadline of a call in seconds of time.monotonic(). Raises GrpcError."""
    value = headers.get("grpc-timeout")
    if value is None:
        return None
    found = _TIMEOUT.fullmatch(value)
    if not found:
        raise GrpcError(StatusCode.INTERNAL, "grpc-timeout is malformed")
    return time.monotonic() + int(found[1]) * _UNITS[found[2]]
