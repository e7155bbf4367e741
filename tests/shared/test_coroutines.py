"""A coroutine without a task runs, waits and is cancelled like one in a task."""

from __future__ import annotations

import asyncio

from atserving.coroutines import Running


async def test_a_cancellation_reaches_the_coroutine_also_if_its_future_is_done() -> None:
    """The future is done, but the coroutine has not gone on yet: it must not begin anything new."""
    loop = asyncio.get_running_loop()
    for done_first in (False, True):
        first: asyncio.Future[None] = loop.create_future()
        steps: list[str] = []
        ends: list[BaseException | None] = []

        async def work(first: asyncio.Future[None] = first, steps: list[str] = steps) -> None:
            await first
            steps.append("went on")

        def ended(_: None, error: BaseException | None, ends: list[BaseException | None] = ends) -> None:
            ends.append(error)

        running = Running(work(), ended)
        if done_first:
            first.set_result(None)
        running.cancel()
        await asyncio.sleep(0)
        assert running.done
        assert steps == []
        assert [type(each) for each in ends] == [asyncio.CancelledError]


async def test_a_coroutine_may_clean_up_after_a_cancellation() -> None:
    loop = asyncio.get_running_loop()
    first, second = loop.create_future(), loop.create_future()
    results: list[str | None] = []

    async def work() -> str:
        try:
            await first
        except asyncio.CancelledError:
            await second
        return "cleaned up"

    running = Running(work(), lambda result, _: results.append(result))
    first.set_result(None)
    running.cancel()
    await asyncio.sleep(0)
    second.set_result(None)
    await asyncio.sleep(0)
    assert results == ["cleaned up"]
