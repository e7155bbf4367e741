"""Streaming calls of gRPC over HTTP/2, as a server sees them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import structlog
from grpc import StatusCode

from atserving.grpc_call import HEAD, GrpcError, failure, ok
from atserving.http2_stream import Headers, Stream

log = structlog.get_logger()

MOST_UNSENT = 64
"""A call waits while its peer has not taken so many messages."""

Handler = Callable[[AsyncIterator[bytes], Headers], AsyncIterator[bytes]]
"""Answers the messages of a call, which has headers, by messages. Raises GrpcError."""


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
    """A streaming call, which runs in a task."""

    def __init__(self, stream: Stream, method: Streaming, most: int) -> None:
        self._stream = stream
        self._method = method
        self._most = most
        self._data = bytearray()
        self._started = False
        self._messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._sent = asyncio.Event()
        stream.on_sent = self._sent.set
        self._task = asyncio.get_running_loop().create_task(self._run())

    def received(self, data: bytes) -> None:
        self._data += data
        while len(self._data) >= HEAD.size:
            flag, length = HEAD.unpack_from(self._data)
            if flag or length > self._most:
                self._task.cancel()
                status = StatusCode.UNIMPLEMENTED if flag else StatusCode.RESOURCE_EXHAUSTED
                self._stream.start(200, failure(status, "the message is compressed or too large"), end=True)
                return
            if len(self._data) < HEAD.size + length:
                break
            self._messages.put_nowait(bytes(self._data[HEAD.size : HEAD.size + length]))
            del self._data[: HEAD.size + length]
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
            async for message in self._method.handler(self._requests(), self._stream.headers):
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
