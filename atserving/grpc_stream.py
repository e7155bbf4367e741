"""Streaming calls of gRPC over HTTP/2, as a server sees them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import structlog
from grpc import StatusCode

from atserving.grpc_call import HEAD, GrpcError, failure, ok, stream_bytes
from atserving.held import HeldBytes
from atserving.http2_stream import NO_HEADERS, Headers, Stream

log = structlog.get_logger()

MOST_UNSENT = 64
"""A call waits while its peer has not taken so many messages."""

# What a message takes beside its bytes, and a call beside what every stream takes.
_MESSAGE_BYTES = 64
_TASK_BYTES = 4 << 10

Handler = Callable[[AsyncIterator[bytes], Headers, tuple[str, ...], str], AsyncIterator[bytes]]
"""Answers the messages of a call, which has headers, and names and an address of its peer. Raises GrpcError."""


@dataclass(frozen=True)
class Streaming:
    """A streaming method: what answers its calls, and how many messages of a call wait for its peer."""

    handler: Handler
    most_unsent: int = MOST_UNSENT


class HttpError(GrpcError):
    """A call that came as HTTP fails before its first message."""

    def __init__(self, status: StatusCode, message: str, http_status: int, headers: Headers, body: bytes) -> None:
        super().__init__(status, message)
        self.http_status = http_status
        self.headers = headers
        self.body = body


class StreamingCall:
    """A streaming call, which runs in a task. It counts as held by the process, with the messages that wait for it."""

    def __init__(self, stream: Stream, method: Streaming, most: int, held: HeldBytes) -> None:
        """Raises GrpcError if there is no memory for the call."""
        self._stream = stream
        self._method = method
        self._most = most
        self._held = held
        self._taken = 0
        self._take(_TASK_BYTES + stream_bytes(stream.headers))
        self._data = bytearray()
        self._started = False
        self._messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._sent = asyncio.Event()
        stream.on_sent = self._sent.set
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(self._done)

    def _take(self, count: int) -> None:
        if not self._held.take(count, large=False):
            raise GrpcError(StatusCode.RESOURCE_EXHAUSTED, "the server holds too many bytes")
        self._taken += count

    def _give(self, count: int) -> None:
        self._held.give(count)
        self._taken -= count

    def _done(self, _: object) -> None:
        self._give(self._taken)
        self._stream.headers = NO_HEADERS

    def received(self, data: bytes) -> None:
        try:
            self._receive(data)
        except GrpcError as error:
            self._task.cancel()
            self._end(error)

    def _receive(self, data: bytes) -> None:
        if self._task.done():
            return
        self._data += data
        while len(self._data) >= HEAD.size:
            flag, length = HEAD.unpack_from(self._data)
            if flag or length > self._most:
                status = StatusCode.UNIMPLEMENTED if flag else StatusCode.RESOURCE_EXHAUSTED
                raise GrpcError(status, "the message is compressed or too large")
            if len(self._data) < HEAD.size + length:
                break
            self._take(_MESSAGE_BYTES + length)
            self._messages.put_nowait(bytes(self._data[HEAD.size : HEAD.size + length]))
            del self._data[: HEAD.size + length]
            # The peer waits with more until this one is taken.
            self._stream.paused = True

    def ended(self) -> None:
        self._messages.put_nowait(None)

    def late(self) -> None:
        """Go on: a call may last."""

    def gone(self) -> None:
        self._task.cancel()

    def stop(self) -> None:
        """End the call, since the server stops."""
        self._task.cancel()
        self._end(GrpcError(StatusCode.UNAVAILABLE, "the server is stopping"))

    async def _requests(self) -> AsyncIterator[bytes]:
        while (message := await self._messages.get()) is not None:
            self._give(_MESSAGE_BYTES + len(message))
            if self._messages.empty():
                self._stream.resume()
            yield message

    async def _run(self) -> None:
        try:
            stream = self._stream
            # In no variable: the traceback of a cancellation would keep it from ending.
            async for message in self._method.handler(
                self._requests(), stream.headers, stream.peer_names, stream.peer_address
            ):
                self._start()
                self._stream.send(HEAD.pack(0, len(message)) + message)
                while self._stream.unsent > self._method.most_unsent:
                    self._sent.clear()
                    await self._sent.wait()
        except GrpcError as error:
            self._end(error)
        except Exception:
            log.exception("call failed", path=self._stream.path)
            self._end(GrpcError(StatusCode.INTERNAL, "the server failed on this call"))
        else:
            self._start()
            self._stream.end(ok())

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._stream.start(200, Headers([("content-type", "application/grpc")]))

    def _end(self, error: GrpcError) -> None:
        if isinstance(error, HttpError) and not self._started:
            self._stream.respond(error.http_status, error.headers, error.body)
            return
        trailers = failure(error.status, str(error), error.trailing, with_type=not self._started)
        if self._started:
            self._stream.end(trailers)
        else:
            self._stream.start(200, trailers, end=True)
