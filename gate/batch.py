"""Runs the tasks of a batch concurrently; each task has its own outcome."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from atserving.errors import PayloadTooLarge, ResourceExhausted, ServingError, Unavailable
from atserving.held import HeldBytes
from gate import responses
from gate.dispatch import CallContext, Dispatcher, End, EvalResult, Task
from gate.request_counts import refusal_of

_PAUSE_S = (0.005, 0.02)
# From so many batches on, they try less often.
_FEW_BATCHES = 64
# What all batches may have running together, roughly: each step of a gate runs all that can go on.
_MOST_RUNNING = 512
# What a task takes in memory, beside the bytes of its request.
_TASK_BYTES = 2 << 10
# A batch that gets no place for so long is told that the instances are full.
_PATIENCE_S = 2.0


MAX_ANSWER_BYTES = 60 << 20
"""The most that the answers of a batch may be together, as they are sent; a message may be 64 MiB."""


async def run_batch(
    dispatcher: Dispatcher,
    tasks: Sequence[Task | ServingError],
    call: CallContext,
    concurrency: int,
    held: HeldBytes,
) -> list[EvalResult | ServingError]:
    """Return the outcomes in the order of the tasks. A task that is already an error keeps it.

    At most ``concurrency`` tasks run at once, and fewer if there are many batches. All deadlines count from the start
    of the batch, so the longest timeout of its tasks bounds the batch. ``held`` counts the tasks, and the answers until
    the last is there. Raises Unavailable if there is no room for the tasks.
    """
    return await _Batch(dispatcher, tasks, call, held).run(concurrency)


class _Batch:
    """A batch that runs.

    A task that finds every instance full is no reason to tell the caller to come later, as long as the batch gets on:
    it waits until another task is done, or for a moment, and tries again.

    While a task waits for an instance of its version, no other of that version begins: they would take the places of
    tasks that have one.
    """

    alive = 0
    """How many batches this process runs."""

    def __init__(
        self, dispatcher: Dispatcher, tasks: Sequence[Task | ServingError], call: CallContext, held: HeldBytes
    ) -> None:
        self._dispatcher = dispatcher
        self._held = held
        self._bytes = 0
        self._is_full = False
        record = call.record
        # What nobody exports or passes on needs no record.
        kept = record if record and (record.trace or record.state) else None
        self._waits: Counter[tuple[str, str]] = Counter()
        self._call = replace(call, batched=True, record=kept, waits=self._waits)
        self._tasks = tasks
        self._calls: dict[int, CallContext] = {}
        self._outcomes: list[EvalResult | ServingError | None] = [None] * len(tasks)
        self._left = deque(range(len(tasks)))
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._tries = False
        self._got_on_s = time.monotonic()

    async def run(self, concurrency: int) -> list[EvalResult | ServingError]:
        size = len(self._tasks) * _TASK_BYTES
        if not self._held.take(size, large=True):
            error = _holds_too_much()
            self._dispatcher.rejected(self._call, error)
            raise error
        _Batch.alive += 1
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(self._tasks), max(1, _MOST_RUNNING // _Batch.alive))):
                    group.create_task(self._work())
        finally:
            _Batch.alive -= 1
            self._held.give(size + self._bytes)
        return [outcome for outcome in self._outcomes if outcome is not None]

    async def _work(self) -> None:
        while self._left:
            index = self._next()
            if index is None:
                await self._another_ends()
                continue
            call = self._call_of(index)
            outcome = await self._outcome(self._tasks[index], call)
            if isinstance(outcome, ResourceExhausted):
                if self._running or self._tries or time.monotonic() - self._got_on_s < _PATIENCE_S:
                    # Behind those of other apps, which may have room.
                    self._left.append(index)
                    await self._wait()
                    continue
                task = self._tasks[index]
                assert isinstance(task, Task)
                self._dispatcher.finished(task, call, End.of(outcome))
            else:
                self._got_on_s = time.monotonic()
            self._outcomes[index] = outcome
            self._calls.pop(index, None)
            self._wake()
            if isinstance(outcome, ServingError):
                # A task that fails at once waits for nothing, and there may be a thousand in each of many batches.
                await asyncio.sleep(0)
        # The last to end leaves nobody waiting.
        while self._waiting:
            self._wake()

    def _call_of(self, index: int) -> CallContext:
        """Return the context of a task, which is that of the batch unless each has a record."""
        batch = self._call.record
        if batch is None:
            return self._call
        call = self._calls.get(index)
        if call is None:
            record = batch.task()
            traceparent = record.trace.traceparent() if record.trace else self._call.traceparent
            call = self._calls[index] = replace(self._call, record=record, traceparent=traceparent)
        return call

    def _next(self) -> int | None:
        """Return the next task to run; None if each is for a version for whose instance another task waits."""
        if not self._waits:
            return self._left.popleft()
        for _ in range(len(self._left)):
            task = self._tasks[index := self._left.popleft()]
            if isinstance(task, ServingError) or (task.app, task.version) not in self._waits:
                return index
            self._left.append(index)
        return None

    async def _outcome(self, task: Task | ServingError, call: CallContext) -> EvalResult | ServingError:
        if isinstance(task, ServingError):
            self._dispatcher.counts.refused("", task.status, refusal_of(task))
            return task
        if self._is_full:
            return _too_large()
        turns = self._dispatcher.turns
        if not turns.is_free():
            turn = asyncio.get_running_loop().create_future()
            # Others of the app do not wait behind its batches.
            turns.wait(f"{self._dispatcher.owner(task, call)}/", partial(_give, turn))
            await turn
        self._running += 1
        try:
            answer = await self._dispatcher.eval(task, call)
        except ServingError as error:
            # Its frames would keep what they have worked with until the batch is answered.
            error.__context__ = None
            return error.with_traceback(None)
        finally:
            self._running -= 1
        return self._kept(answer)

    def _kept(self, answer: EvalResult) -> EvalResult | ServingError:
        """Keep an answer until the others are there. Return an error in its place if there is no room for it."""
        size = responses.size(answer.response)
        # As JSON a stream is base64.
        self._is_full = self._is_full or (self._bytes + size) * 4 // 3 > MAX_ANSWER_BYTES
        if self._is_full:
            return _too_large()
        if not self._held.take(size, large=True):
            return _holds_too_much()
        self._bytes += size
        return answer

    async def _wait(self) -> None:
        """Wait until a task of the batch is done. One worker tries again after a moment in any case."""
        if self._tries:
            await self._another_ends()
            return
        self._tries = True
        try:
            pause_s = random.uniform(*_PAUSE_S)  # noqa: S311 - batches take turns
            await asyncio.sleep(pause_s * max(1.0, _Batch.alive / _FEW_BATCHES))
        finally:
            self._tries = False

    async def _another_ends(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        await waiter

    def _wake(self) -> None:
        if self._waiting:
            self._waiting.popleft().set_result(None)


def _give(turn: asyncio.Future[None]) -> None:
    # The caller may have gone.
    if not turn.done():
        turn.set_result(None)


def _holds_too_much() -> Unavailable:
    return Unavailable("the gate holds as many bytes as it may", retry_after_s=1.0, refusal="memory")


def _too_large() -> PayloadTooLarge:
    most = (MAX_ANSWER_BYTES >> 20) * 3 // 4
    return PayloadTooLarge(f"the answers of the batch are larger than {most} MiB together")
