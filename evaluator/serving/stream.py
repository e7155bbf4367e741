"""The instance's end of a gate's stream: calls in, replies out, many to a message."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from atserving.v1 import evaluator_pb2

MOST_OPEN = 4096
"""How many calls of one stream may be open; no more are read until some are answered."""

_FRAME_BYTES = 4 << 20

Infer = Callable[[evaluator_pb2.Call], Coroutine[Any, Any, evaluator_pb2.InferResponse]]
Write = Callable[[evaluator_pb2.ExchangeResponse], Awaitable[None]]


class GateStream:
    """One stream. Each call runs in a task of its own; its reply leaves with all others that are ready by then."""

    def __init__(self, infer: Infer) -> None:
        """``infer`` answers a call, and is cancelled with it; it raises nothing else."""
        self._infer = infer
        self._open: dict[int, asyncio.Task[evaluator_pb2.InferResponse]] = {}
        self._places = asyncio.Semaphore(MOST_OPEN)
        self._replies: deque[evaluator_pb2.Reply] = deque()
        self._changed = asyncio.Event()
        self._read_all = False

    async def run(self, requests: AsyncIterable[evaluator_pb2.ExchangeRequest], write: Write) -> None:
        """Returns once the gate has said its last and every reply is written. Cancelled, it cancels what is open."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(requests))
                group.create_task(self._write(write))
        finally:
            tasks = list(self._open.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, requests: AsyncIterable[evaluator_pb2.ExchangeRequest]) -> None:
        async for request in requests:
            for id_ in request.cancelled:
                if open_ := self._open.get(id_):
                    open_.cancel()
            for call in request.calls:
                await self._places.acquire()
                task = asyncio.create_task(self._infer(call))
                self._open[call.id] = task
                task.add_done_callback(partial(self._answered, call.id))
        self._read_all = True
        self._changed.set()

    def _answered(self, id_: int, task: asyncio.Task[evaluator_pb2.InferResponse]) -> None:
        del self._open[id_]
        if task.cancelled() or task.exception():
            self._places.release()
        else:
            self._replies.append(evaluator_pb2.Reply(id=id_, response=task.result()))
        self._changed.set()

    async def _write(self, write: Write) -> None:
        while self._replies or self._open or not self._read_all:
            self._changed.clear()
            while self._replies:
                await write(self._frame())
            if self._open or not self._read_all:
                await self._changed.wait()

    def _frame(self) -> evaluator_pb2.ExchangeResponse:
        """What is ready, up to a size that keeps one message from holding up the rest for long."""
        frame = evaluator_pb2.ExchangeResponse()
        size = 0
        while self._replies and size < _FRAME_BYTES:
            reply = self._replies.popleft()
            size += reply.ByteSize()
            frame.replies.append(reply)
            self._places.release()
        return frame
