"""The capacity of an instance bounds its requests in flight, and refuses any further request."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atserving.errors import ResourceExhausted, Unavailable
from evaluator.serving.capacity import Capacity


@given(limit=st.integers(1, 5), steps=st.lists(st.booleans(), max_size=40))
def test_requests_in_flight_never_exceed_the_limit(limit: int, steps: list[bool]) -> None:
    capacity = Capacity(limit)
    in_flight: list[ExitStack] = []
    for enters in steps:
        if enters:
            stack = ExitStack()
            if len(in_flight) == limit:
                with pytest.raises(ResourceExhausted) as refusal:
                    stack.enter_context(capacity.hold())
                assert refusal.value.refused
                assert (refusal.value.retry_after_s or 0) > 0
            else:
                stack.enter_context(capacity.hold())
                in_flight.append(stack)
        elif in_flight:
            in_flight.pop(0).close()
        assert capacity.in_flight == len(in_flight) <= limit


async def test_limit_can_be_raised_and_lowered() -> None:
    capacity = Capacity(1)
    with ExitStack() as stack:
        stack.enter_context(capacity.hold())
        capacity.limit = 2
        stack.enter_context(capacity.hold())
        capacity.limit = 1
        with pytest.raises(ResourceExhausted):
            stack.enter_context(capacity.hold())


async def test_retry_delay_grows_with_the_requests_in_flight() -> None:
    capacity = Capacity(0)
    delays_s: list[float] = []
    with ExitStack() as stack:
        for limit in (1, 100, 10_000):
            capacity.limit = limit
            while capacity.in_flight < limit:
                stack.enter_context(capacity.hold())
            with pytest.raises(ResourceExhausted) as refusal:
                stack.enter_context(capacity.hold())
            delays_s.append(refusal.value.retry_after_s or 0)
            if limit == 1:
                # The first request ends and is measured; it took at least this long.
                await asyncio.sleep(0.002)
                stack.pop_all().close()
    assert delays_s[0] < delays_s[1] < delays_s[2]


async def test_drain_refuses_requests_and_waits_for_those_in_flight() -> None:
    capacity = Capacity(2)
    with capacity.hold():
        capacity.drain()
        drained = asyncio.create_task(capacity.drained())
        with pytest.raises(Unavailable) as refusal, capacity.hold():
            pass
        assert refusal.value.refused
        await asyncio.sleep(0)
        assert not drained.done()
    await drained
