"""Dynamic batching: many requests come in one by one, and go through the engine together.

Knows nothing of gRPC, images or nets.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from atserving.errors import Internal, ResourceExhausted, ServingError, Unavailable

Q = TypeVar("Q")
A = TypeVar("A")

_LEAST_RETRY_AFTER_S = 0.05


@dataclass(frozen=True)
class Answer(Generic[A]):
    """An answer and where its time went, in seconds: waiting for the engine, and in it."""

    value: A
    queue_s: float
    forward_s: float


@dataclass(eq=False)
class _Pending(Generic[Q, A]):
    request: Q
    arrived_s: float
    answer: asyncio.Future[Answer[A]]
    started_s: float = field(default=0.0)


class Batcher(Generic[Q, A]):
    """Holds requests, runs them in batches.

    1. A request is in one place at a time: with its caller (between ``hold`` and ``submit``), in ``_waiting``, or in
       ``_running``. It gets exactly one answer, its own, or its caller is gone.
    2. ``held <= max_concurrent``: ``hold`` refuses one more. (Where the maximum is lowered, those held may finish.)
    3. A batch has 1 to ``batch_size`` requests, in the order of their arrival. One batch runs at a time.
    4. A caller that goes takes its request out of ``_waiting``, so that it never runs. One that already runs is
       finished and its answer dropped; its place is free at once, as the engine's batch is one in any case.
    5. The loop below waits in three places only: for a request to come, for a batch to fill (never longer than
       ``delay_s`` after its oldest request came), and for the engine.
    6. Where a batch fails, its requests run again one by one: only those to blame fail.
    """

    def __init__(
        self,
        forward: Callable[[Sequence[Q]], Sequence[A | ServingError]],
        batch_size: int,
        *,
        max_concurrent: int,
        delay_s: float = 0.0,
    ) -> None:
        """``forward`` runs a batch, in a thread of its own, and returns one answer or error a request, in order.

        What it raises fails the batch as a whole.
        """
        self.max_concurrent = max_concurrent
        self.held = 0
        self._forward = forward
        self._batch_size = batch_size
        self._delay_s = delay_s
        self._draining = False
        self._waiting: deque[_Pending[Q, A]] = deque()
        self._running: list[_Pending[Q, A]] = []
        self._changed = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._engine = ThreadPoolExecutor(1, "engine")
        self._batch_s = 0.0

    def configure(self, *, max_concurrent: int, delay_s: float) -> None:
        """Applies from now on, to what waits as well."""
        self.max_concurrent = max_concurrent
        self._delay_s = delay_s
        self._changed.set()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """A place for one request, from before it costs anything until it is answered.

        Raises ResourceExhausted where all are taken, Unavailable while draining; both ``refused``.
        """
        if self._draining:
            raise Unavailable("the instance is leaving", refused=True)
        if self.held >= self.max_concurrent:
            raise ResourceExhausted(
                f"the instance holds {self.held} requests, as many as it may",
                retry_after_s=self._retry_after_s(),
                refused=True,
            )
        self.held += 1
        self._empty.clear()
        try:
            yield
        finally:
            self.held -= 1
            if not self.held:
                self._empty.set()

    async def submit(self, request: Q) -> Answer[A]:
        """The answer to a request that has a place. Raises the ServingError that is its outcome.

        Cancelling the call, a deadline's doing as a rule, takes the request back if it has not started.
        """
        loop = asyncio.get_running_loop()
        pending: _Pending[Q, A] = _Pending(request, loop.time(), loop.create_future())
        self._waiting.append(pending)
        self._changed.set()
        try:
            return await pending.answer
        finally:
            if pending.answer.cancelled():
                with suppress(ValueError):
                    self._waiting.remove(pending)

    async def run(self) -> None:
        """Answers until cancelled. What is then still held fails with Unavailable."""
        try:
            while True:
                await self._batch_is_due()
                self._running = self._take()
                await self._run_batch(self._running)
                self._running = []
        finally:
            for pending in (*self._running, *self._waiting):
                if not pending.answer.done():
                    pending.answer.set_exception(Unavailable("the instance has stopped"))
            self._waiting.clear()
            self._engine.shutdown(wait=False, cancel_futures=True)

    async def _batch_is_due(self) -> None:
        now = asyncio.get_running_loop().time
        while True:
            self._changed.clear()
            wait_s = math.inf
            if self._waiting:
                wait_s = self._waiting[0].arrived_s + self._delay_s - now()
            if len(self._waiting) >= self._batch_size or wait_s <= 0 or (self._waiting and self._draining):
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(None if math.isinf(wait_s) else wait_s):
                    await self._changed.wait()

    def _take(self) -> list[_Pending[Q, A]]:
        batch: list[_Pending[Q, A]] = []
        while self._waiting and len(batch) < self._batch_size:
            pending = self._waiting.popleft()
            # Cancelled in this very turn of the event loop: its caller has not yet come to remove it.
            if not pending.answer.done():
                batch.append(pending)
        return batch

    async def _run_batch(self, batch: Sequence[_Pending[Q, A]]) -> None:
        if not batch:
            return
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        for pending in batch:
            pending.started_s = pending.started_s or began_s
        try:
            answers = await loop.run_in_executor(self._engine, self._forward, [pending.request for pending in batch])
            if len(answers) != len(batch):
                raise Internal("the forward pass lost a request")
        except Exception as error:
            await self._after_failure(batch, error)
            return
        ended_s = loop.time()
        self._batch_s += (ended_s - began_s - self._batch_s) / (8 if self._batch_s else 1)
        for pending, answer in zip(batch, answers, strict=True):
            if pending.answer.done():
                continue
            if isinstance(answer, ServingError):
                pending.answer.set_exception(answer)
            else:
                queue_s, forward_s = pending.started_s - pending.arrived_s, ended_s - pending.started_s
                pending.answer.set_result(Answer(answer, queue_s, forward_s))

    async def _after_failure(self, batch: Sequence[_Pending[Q, A]], error: Exception) -> None:
        if len(batch) == 1:
            if not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for pending in batch:
            if not pending.answer.done():
                await self._run_batch([pending])

    def _retry_after_s(self) -> float:
        """About when what is held will have gone through the engine."""
        batches = math.ceil(self.held / self._batch_size)
        return max(batches * self._batch_s, _LEAST_RETRY_AFTER_S)

    def drain(self) -> None:
        """From now on ``hold`` refuses; what is held finishes, without waiting for batches to fill."""
        self._draining = True
        self._changed.set()

    async def drained(self) -> None:
        """Returns once nothing is held."""
        await self._empty.wait()
