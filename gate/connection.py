"""Connects to an evaluator instance. No other module of the gate knows how requests travel there."""

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

CONNECT_TIMEOUT_S = 2.0
_PAUSE_S = 0.1
_FRAME_BYTES = 4 << 20

Stream = grpc.aio.StreamStreamCall[evaluator_pb2.ExchangeRequest, evaluator_pb2.ExchangeResponse]


class TransportError(Exception):
    """The instance could not be reached, or the connection broke with the request in flight (``reached``)."""

    def __init__(self, message: str, reached: bool) -> None:
        super().__init__(message)
        self.reached = reached


@dataclass(eq=False)
class _PendingCall:
    """A call without a reply so far."""

    call: evaluator_pb2.Call
    answer: asyncio.Future[evaluator_pb2.InferResponse]
    sent: bool = False


class EvaluatorConnection:
    """One instance, reached over one long-lived stream that is opened at once, and again after it breaks.

    A call enters ``_outbox``, where the writer collects all waiting calls and sends them as one message. It stays in
    ``_pending`` until its reply arrives, its caller leaves, or the stream breaks. While the instance is unreachable,
    calls fail at once; no call waits for a connection that has failed.
    """

    def __init__(self, instance: Instance, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        self._id = instance.id
        self._connect_timeout_s = connect_timeout_s
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
        """Return the instance's response. Cancelling this also cancels the work on the instance.

        Raises TransportError, and TimeoutError if ``timeout_s`` passes.
        """
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
            # Still pending: the caller left or the deadline passed. An unsent call is never sent.
            if self._pending.pop(call.id, None) and one.sent:
                self._gone.append(call.id)
                self._something.set()

    async def close(self) -> None:
        """Close at once; calls in flight fail."""
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
                    reason = f"no connection within {self._connect_timeout_s:g} s"
                except Exception:
                    # Callers must not wait on a stream without a reader.
                    log.exception("stream failed", instance=self._id)
                    reason = "the stream failed unexpectedly"
                self._fail(reason)
                await asyncio.sleep(_PAUSE_S)
        finally:
            self._fail("the connection was closed")

    @asynccontextmanager
    async def _stream(self) -> AsyncIterator[Stream]:
        stream: Stream = self._stub.Exchange()  # type: ignore[call-arg] # requests are written one by one
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await stream.wait_for_connection()
            self._down = ""
            yield stream
        finally:
            stream.cancel()

    async def _exchange(self, stream: Stream) -> None:
        """Return when the instance ends the stream. Raises AioRpcError if it breaks."""
        writing = asyncio.create_task(self._write(stream))
        try:
            while isinstance(response := await stream.read(), evaluator_pb2.ExchangeResponse):
                for reply in response.replies:
                    one = self._pending.pop(reply.id, None)
                    if one and not one.answer.done():
                        one.answer.set_result(reply.response)
        finally:
            writing.cancel()
            # The reader reports the failure that the writer saw too.
            await asyncio.gather(writing, return_exceptions=True)

    async def _write(self, stream: Stream) -> None:
        while True:
            await self._something.wait()
            self._something.clear()
            while frame := self._frame():
                await stream.write(frame)

    def _frame(self) -> evaluator_pb2.ExchangeRequest | None:
        """Return the waiting calls as one message, of a bounded size so that it does not delay later ones for long."""
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
