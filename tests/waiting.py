"""Wait in tests for a condition. The limit is generous: tests do not measure time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

POLL_S = 0.02
PATIENCE_S = 60.0


async def until(condition: Callable[[], object], what: str = "the condition holds") -> None:
    """Wait until a condition holds. ``what`` completes the message of a failure: "not within 60 s: ..."."""

    async def holds() -> object:
        return condition()

    await until_async(holds, what=what)


async def until_async(
    condition: Callable[[], Awaitable[object]], *ignored: type[Exception], what: str = "the condition holds"
) -> None:
    """Wait until a condition holds. While it raises an exception of a type in ``ignored``, it does not hold."""
    last: Exception | None = None
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    if await condition():
                        return
                except ignored as error:
                    last = error
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        pytest.fail(f"not within {PATIENCE_S:g} s: {what}" + (f"; last: {last!r}" if last else ""))
