"""A process ends when it is told to, and when a part of it dies."""

from __future__ import annotations

import asyncio

import pytest

from atserving import transport


async def forever() -> None:
    await asyncio.Event().wait()


async def fail() -> None:
    raise ValueError("boom")


async def end() -> None:
    return


async def test_a_process_goes_on_until_it_is_stopped() -> None:
    stop, background = asyncio.Event(), asyncio.create_task(forever())
    waiting = asyncio.create_task(transport.until_stopped(stop, background))
    await asyncio.sleep(0)
    assert not waiting.done()
    stop.set()
    await waiting
    background.cancel()


@pytest.mark.parametrize(("work", "error"), [(fail, "boom"), (end, "ended by itself")])
async def test_a_background_task_that_dies_ends_the_process(work: object, error: str) -> None:
    assert callable(work)
    with pytest.raises((ValueError, RuntimeError), match=error):
        await transport.until_stopped(asyncio.Event(), asyncio.create_task(work()))
