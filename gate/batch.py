"""Runs the tasks of a batch concurrently; each task has its own outcome."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from atserving.errors import ResourceExhausted, ServingError
from gate.dispatch import CallContext, Dispatcher, EvalResult, Task

_PAUSE_S = (0.005, 0.02)
# A batch that gets no place for so long is told that the instances are full.
_PATIENCE_S = 2.0


async def run_batch(
    dispatcher: Dispatcher, tasks: Sequence[Task | ServingError], call: CallContext, concurrency: int
) -> list[EvalResult | ServingError]:
    """Return the outcomes in the order of the tasks. A task that is already an error keeps it.

    At most ``concurrency`` tasks run at once. All deadlines count from the start of the batch, so the longest timeout
    of its tasks bounds the batch.
    """
    return await _Batch(dispatcher, tasks, call).run(concurrency)


class _Batch:
    """A batch that runs.

    A task that finds every instance full is no reason to tell the caller to come later, as long as the batch gets on:
    it waits until another task is done, or for a moment, and tries again.
    """

    def __init__(self, dispatcher: Dispatcher, tasks: Sequence[Task | ServingError], call: CallContext) -> None:
        self._dispatcher = dispatcher
        self._call = replace(call, batched=True)
        self._tasks = tasks
        self._outcomes: list[EvalResult | ServingError | None] = [None] * len(tasks)
        self._left = deque(range(len(tasks)))
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._tries = False
        self._got_on_s = time.monotonic()

    async def run(self, concurrency: int) -> list[EvalResult | ServingError]:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(self._tasks))):
                group.create_task(self._work())
        return [outcome for outcome in self._outcomes if outcome is not None]

    async def _work(self) -> None:
        while self._left:
            index = self._left.popleft()
            outcome = await self._outcome(self._tasks[index])
            if isinstance(outcome, ResourceExhausted):
                if self._running or self._tries or time.monotonic() - self._got_on_s < _PATIENCE_S:
                    # Behind those of other apps, which may have room.
                    self._left.append(index)
                    await self._wait()
                    continue
                task = self._tasks[index]
                assert isinstance(task, Task)
                self._dispatcher.finished(task, self._call, "", outcome.code, outcome.message)
            else:
                self._got_on_s = time.monotonic()
            self._outcomes[index] = outcome
            self._wake()
        # The last to end leaves nobody waiting.
        while self._waiting:
            self._wake()

    async def _outcome(self, task: Task | ServingError) -> EvalResult | ServingError:
        if isinstance(task, ServingError):
            return task
        self._running += 1
        try:
            return await self._dispatcher.eval(task, self._call)
        except ServingError as error:
            return error
        finally:
            self._running -= 1

    async def _wait(self) -> None:
        """Wait until a task of the batch is done. One worker tries again after a moment in any case."""
        if self._tries:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter
            return
        self._tries = True
        try:
            await asyncio.sleep(random.uniform(*_PAUSE_S))  # noqa: S311 - batches take turns
        finally:
            self._tries = False

    def _wake(self) -> None:
        if self._waiting:
            self._waiting.popleft().set_result(None)
