"""The life of a process: it works until a signal stops it or until one of its background tasks fails."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


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
        stopping.cancel()
        await asyncio.gather(stopping, return_exceptions=True)


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
        for task in (working, stopped):
            task.cancel()
        await asyncio.gather(working, stopped, return_exceptions=True)
