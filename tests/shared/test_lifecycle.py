"""A process stops on a signal, and when one of its background tasks ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from atserving import lifecycle


async def forever() -> None:
    await asyncio.Event().wait()


async def fail() -> None:
    raise ValueError("boom")


async def end() -> None:
    return


async def test_a_process_runs_until_it_is_stopped() -> None:
    stop, background = asyncio.Event(), asyncio.create_task(forever())
    waiting = asyncio.create_task(lifecycle.until_stopped(stop, background))
    await asyncio.sleep(0)
    assert not waiting.done()
    stop.set()
    await waiting
    background.cancel()


@pytest.mark.parametrize(("work", "error"), [(fail, "boom"), (end, "ended by itself")])
async def test_a_background_task_that_ends_stops_the_process(
    work: Callable[[], Coroutine[Any, Any, None]], error: str
) -> None:
    with pytest.raises((ValueError, RuntimeError), match=error):
        await lifecycle.until_stopped(asyncio.Event(), asyncio.create_task(work()))


class Work:
    """Work that takes forever, and records that it was cancelled."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cancelled = False

    async def run(self) -> str:
        self.started.set()
        try:
            await forever()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return "never"


async def test_work_that_ends_first_returns_its_result() -> None:
    async def work() -> str:
        return "done"

    background = asyncio.create_task(forever())
    assert await lifecycle.unless_stopped(work(), asyncio.Event(), background) == "done"
    assert not background.done()
    background.cancel()


async def test_work_that_fails_raises_its_error() -> None:
    with pytest.raises(ValueError, match="boom"):
        await lifecycle.unless_stopped(fail(), asyncio.Event())


async def test_a_stop_cancels_the_work() -> None:
    stop, work = asyncio.Event(), Work()
    waiting = asyncio.create_task(lifecycle.unless_stopped(work.run(), stop))
    await work.started.wait()
    stop.set()
    assert await waiting is None
    assert work.cancelled


@pytest.mark.parametrize(("background", "error"), [(fail, "boom"), (end, "ended by itself")])
async def test_a_background_task_that_ends_cancels_the_work(
    background: Callable[[], Coroutine[Any, Any, None]], error: str
) -> None:
    work = Work()
    with pytest.raises((ValueError, RuntimeError), match=error):
        await lifecycle.unless_stopped(work.run(), asyncio.Event(), asyncio.create_task(background()))
    assert work.cancelled


async def test_a_timeout_cancels_the_work() -> None:
    work = Work()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await lifecycle.unless_stopped(work.run(), asyncio.Event())
    assert work.cancelled


async def swallow(times: int) -> None:
    """Miss some cancellations, as code does that catches more than it should."""
    while times:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            times -= 1
    await asyncio.Event().wait()


async def test_a_task_that_misses_cancellations_ends_too() -> None:
    tasks = [asyncio.create_task(swallow(times)) for times in (0, 1, 3)]
    await asyncio.sleep(0)
    await lifecycle.end(tasks)
    assert all(task.cancelled() for task in tasks)


async def test_the_errors_of_ended_tasks_are_lost() -> None:
    task = asyncio.create_task(fail())
    await asyncio.sleep(0)
    await lifecycle.end([task, None])
    assert isinstance(task.exception(), ValueError)


def test_a_run_ends_the_tasks_that_its_main_leaves() -> None:
    left: list[asyncio.Task[None]] = []

    async def main() -> None:
        left.append(asyncio.create_task(swallow(2)))
        await asyncio.sleep(0)

    lifecycle.run(main())
    assert left[0].cancelled()
