"""The instance's end of a gRPC stream: takes calls and sends replies, many in one message."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from atserving.v1 import evaluator_pb2

MOST_OPEN = 4096
"""How many calls of one stream may be in flight; the stream reads no more until some have their reply."""

_FRAME_BYTES = 4 << 20

Infer = Callable[[evaluator_pb2.Call], Coroutine[Any, Any, evaluator_pb2.InferResponse]]
Write = Callable[[evaluator_pb2.ExchangeResponse], Awaitable[None]]


class GateStream:
    """One stream. Each call runs in its own task; its reply leaves together with all others that are ready."""

    def __init__(self, infer: Infer) -> None:
        """``infer`` answers a call. Cancelling the call cancels it; it raises nothing else."""
        self._infer = infer
        self._tasks: dict[int, asyncio.Task[evaluator_pb2.InferResponse]] = {}
        self._slots = asyncio.Semaphore(MOST_OPEN)
        self._replies: deque[evaluator_pb2.Reply] = deque()
        self._changed = asyncio.Event()
        self._read_all = False

    async def run(self, requests: AsyncIterable[evaluator_pb2.ExchangeRequest], write: Write) -> None:
        """Serve the stream until the gate ends it and every reply is sent. Cancelling this cancels all its calls."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(requests))
                group.create_task(self._write(write))
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, requests: AsyncIterable[evaluator_pb2.ExchangeRequest]) -> None:
        async for request in requests:
            for id_ in request.cancelled:
                if task := self._tasks.get(id_):
                    task.cancel()
            for call in request.calls:
                await self._slots.acquire()
                task = asyncio.create_task(self._infer(call))
                self._tasks[call.id] = task
                task.add_done_callback(partial(self._answered, call.id))
        self._read_all = True
        self._changed.set()

    def _answered(self, id_: int, task: asyncio.Task[evaluator_pb2.InferResponse]) -> None:
        del self._tasks[id_]
        if task.cancelled() or task.exception():
            self._slots.release()
        else:
            self._replies.append(evaluator_pb2.Reply(id=id_, response=task.result()))
        self._changed.set()

    async def _write(self, write: Write) -> None:
        while self._replies or self._tasks or not self._read_all:
            self._changed.clear()
            while self._replies:
                await write(self._frame())
            if self._tasks or not self._read_all:
                await self._changed.wait()

    def _frame(self) -> evaluator_pb2.ExchangeResponse:
        """Return the ready replies as one message, of a bounded size so that it does not delay later ones for long."""
        frame = evaluator_pb2.ExchangeResponse()
        size = 0
        while self._replies and size < _FRAME_BYTES:
            reply = self._replies.popleft()
            size += reply.ByteSize()
            frame.replies.append(reply)
            self._slots.release()
        return frame
