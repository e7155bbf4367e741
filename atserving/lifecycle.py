"""The life of a process: it works until a signal stops it or until one of its background tasks fails."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

import structlog
import uvloop

log = structlog.get_logger()

_T = TypeVar("_T")

# A task may take so long to clean up before it is cancelled again.
_AGAIN_S = 1.0
_REMIND_TURNS = 5


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run ``main`` on an event loop of its own, and end every task that it leaves."""

    async def whole() -> None:
        try:
            await main
        finally:
            await end(asyncio.all_tasks() - {asyncio.current_task()})

    uvloop.run(whole())


async def end(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    """Cancel tasks and wait for their end. Their results and errors are lost.

    A task may miss a cancellation, which libraries swallow at times. It is cancelled until it has ended, so whoever
    stops something comes to an end.
    """
    left: set[asyncio.Task[Any]] = {task for task in tasks if task}
    turns = 0
    while left:
        for task in left:
            task.cancel()
        done, left = await asyncio.wait(left, timeout=_AGAIN_S)
        for task in done:
            if not task.cancelled():
                # Otherwise asyncio logs that nobody has seen its error.
                task.exception()
        turns += 1
        if turns % _REMIND_TURNS == 0:
            log.warning("stop delayed", tasks=sorted(task.get_name() for task in left)[:10])


def stop_signal() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, event.set)
    return event


async def until_stopped(stop: asyncio.Event, *tasks: asyncio.Task[None]) -> None:
    """Wait until ``stop`` is set.

    Raises the error of a background task that fails, and RuntimeError if a background task ends by itself.
    """
    stopping = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopping}:
            task.result()
            raise RuntimeError("a background task ended by itself")
    finally:
        await end([stopping])


async def unless_stopped(work: Coroutine[Any, Any, _T], stop: asyncio.Event, *tasks: asyncio.Task[None]) -> _T | None:
    """Return the result of ``work``, or None if ``stop`` is set first.

    Raises the error of ``work``, and what :func:`until_stopped` raises for the background tasks. Cancels ``work`` and
    awaits it in every other case.
    """
    working = asyncio.create_task(work)
    stopped = asyncio.create_task(until_stopped(stop, *tasks))
    try:
        await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if stopped.done():
            stopped.result()
            return None
        return working.result()
    finally:
        await end([working, stopped])
