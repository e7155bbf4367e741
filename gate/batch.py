"""Runs the tasks of a batch concurrently; each task has its own outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from atserving.errors import ServingError
from gate.dispatch import CallContext, Dispatcher, EvalResult, Task


async def run_batch(
    dispatcher: Dispatcher, tasks: Sequence[Task | ServingError], call: CallContext, concurrency: int
) -> list[EvalResult | ServingError]:
    """Return the outcomes in the order of the tasks. A task that is already an error keeps it.

    At most ``concurrency`` tasks run at once, so that a large batch does not fill the instances' queues alone. All
    deadlines count from the start of the batch, so the longest timeout of its tasks bounds the batch.
    """
    results: list[EvalResult | ServingError | None] = [None] * len(tasks)
    left = iter(enumerate(tasks))

    async def work() -> None:
        for index, task in left:
            try:
                results[index] = task if isinstance(task, ServingError) else await dispatcher.eval(task, call)
            except ServingError as error:
                results[index] = error

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(tasks))):
            group.create_task(work())
    return [result for result in results if result is not None]
