"""A batch: its tasks run concurrently, and each has its own outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from atserving.errors import ServingError
from gate.dispatch import CallContext, Dispatcher, EvalResult, Task


async def run_batch(
    dispatcher: Dispatcher, tasks: Sequence[Task | ServingError], call: CallContext, concurrency: int
) -> list[EvalResult | ServingError]:
    """The outcomes, in the order of the tasks; one that is an error already stays so.

    At most ``concurrency`` tasks are under way at once, so that a large batch does not fill the instances' queues by
    itself. All deadlines count from the batch's beginning: its bound is the longest of its items'.
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
