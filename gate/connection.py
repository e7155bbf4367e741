"""The way to an evaluator instance. Nothing outside this module knows how requests travel there."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import grpc.aio
import structlog

from atserving import transport
from atserving.config import Instance
from atserving.v1 import evaluator_pb2, evaluator_pb2_grpc

log = structlog.get_logger()

_CONNECT_S = 2.0
_PAUSE_S = 0.1
_FRAME_BYTES = 4 << 20

Stream = grpc.aio.StreamStreamCall[evaluator_pb2.ExchangeRequest, evaluator_pb2.ExchangeResponse]


class TransportError(Exception):
    """The instance could not be reached, or was lost with the request on it (``reached``)."""

    def __init__(self, message: str, reached: bool) -> None:
        super().__init__(message)
        self.reached = reached


@dataclass(eq=False)
class _PendingCall:
    """A call that is not answered yet."""

    call: evaluator_pb2.Call
    answer: asyncio.Future[evaluator_pb2.InferResponse]
    sent: bool = False


class EvaluatorConnection:
    """One instance, over one long-lived stream, opened at once and again whenever it breaks.

    A call is first in ``_outbox``; the writer takes all that has gathered there and sends it as one message. It is in
    ``_open`` from the beginning until it is answered, its caller is gone, or the stream has broken. While the instance
    can't be reached calls fail at once; nothing waits here for a connection that has failed.
    """

    def __init__(self, instance: Instance) -> None:
        self._channel = transport.channel(instance.address)
        self._stub = evaluator_pb2_grpc.EvaluatorServiceStub(self._channel)
        self._ids = itertools.count(1)
        self._pending: dict[int, _PendingCall] = {}
        self._outbox: deque[_PendingCall] = deque()
        self._gone: list[int] = []
        self._something = asyncio.Event()
        self._down = ""
        self._running = asyncio.create_task(self._run())

    async def infer(
        self, request: evaluator_pb2.InferRequest, timeout_s: float, traceparent: str | None
    ) -> evaluator_pb2.InferResponse:
        """Raises TransportError, and TimeoutError where the deadline passed. Cancelling it cancels the work there."""
        if self._down:
            raise TransportError(self._down, reached=False)
        call = evaluator_pb2.Call(
            id=next(self._ids), request=request, timeout_us=int(timeout_s * 1e6) or 1, traceparent=traceparent or ""
        )
        one = _PendingCall(call, asyncio.get_running_loop().create_future())
        self._pending[call.id] = one
        self._outbox.append(one)
        self._something.set()
        try:
            async with asyncio.timeout(timeout_s):
                return await one.answer
        finally:
            # Still there: the caller has gone, or the deadline has passed. What was not sent never will be.
            if self._pending.pop(call.id, None) and one.sent:
                self._gone.append(call.id)
                self._something.set()

    async def close(self) -> None:
        """Closes at once; whatever is in flight fails."""
        self._running.cancel()
        with suppress(asyncio.CancelledError):
            await self._running
        await self._channel.close(None)

    async def _run(self) -> None:
        try:
            while True:
                try:
                    async with self._stream() as stream:
                        await self._exchange(stream)
                    reason = "the instance ended the stream"
                except grpc.aio.AioRpcError as error:
                    reason = error.details() or error.code().name
                except TimeoutError:
                    reason = f"no connection within {_CONNECT_S:g} s"
                except Exception:
                    # Whatever it was, callers must not wait on a connection that nobody tends.
                    log.exception("the stream to an instance failed unexpectedly")
                    reason = "the stream failed unexpectedly"
                self._fail(reason)
                await asyncio.sleep(_PAUSE_S)
        finally:
            self._fail("the connection was closed")

    @asynccontextmanager
    async def _stream(self) -> AsyncIterator[Stream]:
        stream: Stream = self._stub.Exchange()  # type: ignore[call-arg] # requests are written one by one
        try:
            async with asyncio.timeout(_CONNECT_S):
                await stream.wait_for_connection()
            self._down = ""
            yield stream
        finally:
            stream.cancel()

    async def _exchange(self, stream: Stream) -> None:
        """Returns when the instance ends the stream. Raises AioRpcError where it breaks."""
        writing = asyncio.create_task(self._write(stream))
        try:
            while isinstance(response := await stream.read(), evaluator_pb2.ExchangeResponse):
                for reply in response.replies:
                    one = self._pending.pop(reply.id, None)
                    if one and not one.answer.done():
                        one.answer.set_result(reply.response)
        finally:
            writing.cancel()
            # What the writer met is what the reader meets, and is told by it.
            await asyncio.gather(writing, return_exceptions=True)

    async def _write(self, stream: Stream) -> None:
        while True:
            await self._something.wait()
            self._something.clear()
            while frame := self._frame():
                await stream.write(frame)

    def _frame(self) -> evaluator_pb2.ExchangeRequest | None:
        """What waits, up to a size that keeps one message from holding up the rest for long."""
        frame = evaluator_pb2.ExchangeRequest(cancelled=self._gone)
        self._gone.clear()
        size = 0
        while self._outbox and size < _FRAME_BYTES:
            one = self._outbox.popleft()
            if one.call.id in self._pending:
                one.sent = True
                size += one.call.ByteSize()
                frame.calls.append(one.call)
        return frame if frame.calls or frame.cancelled else None

    def _fail(self, reason: str) -> None:
        self._down = reason
        for one in self._pending.values():
            if not one.answer.done():
                one.answer.set_exception(TransportError(reason, reached=one.sent))
        self._pending.clear()
        self._outbox.clear()
        self._gone.clear()
