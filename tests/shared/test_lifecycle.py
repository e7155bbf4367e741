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
