"""The capacity of an instance bounds its requests in flight, and refuses any further request."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atserving.errors import ResourceExhausted, Unavailable
from evaluator.serving.capacity import Capacity


@given(limit=st.integers(1, 5), steps=st.lists(st.booleans(), max_size=40))
def test_requests_in_flight_never_exceed_the_limit(limit: int, steps: list[bool]) -> None:
    capacity = Capacity(limit)
    in_flight: list[int] = []
    for enters in steps:
        if enters and len(in_flight) == limit:
            with pytest.raises(ResourceExhausted) as refusal:
                capacity.enter()
            assert refusal.value.refused
            assert (refusal.value.retry_after_s or 0) > 0
        elif enters:
            in_flight.append(capacity.enter())
        elif in_flight:
            capacity.leave(in_flight.pop(0), time.monotonic())
        assert capacity.in_flight == len(in_flight) <= limit


async def test_limit_can_be_raised_and_lowered() -> None:
    capacity = Capacity(1)
    capacity.enter()
    capacity.limit = 2
    capacity.enter()
    capacity.limit = 1
    with pytest.raises(ResourceExhausted):
        capacity.enter()


async def test_retry_delay_grows_with_the_requests_in_flight() -> None:
    capacity = Capacity(0)
    delays_s: list[float] = []
    for limit in (1, 100, 10_000):
        capacity.limit = limit
        while capacity.in_flight < limit:
            capacity.enter()
        with pytest.raises(ResourceExhausted) as refusal:
            capacity.enter()
        delays_s.append(refusal.value.retry_after_s or 0)
        if limit == 1:
            # The first request ends after 2 ms.
            capacity.leave(1, time.monotonic() - 0.002)
    assert delays_s[0] < delays_s[1] < delays_s[2]


async def test_drain_refuses_requests_and_waits_for_those_in_flight() -> None:
    capacity = Capacity(2)
    ahead = capacity.enter()
    capacity.drain()
    drained = asyncio.create_task(capacity.drained())
    with pytest.raises(Unavailable) as refusal:
        capacity.enter()
    assert refusal.value.refused
    await asyncio.sleep(0)
    assert not drained.done()
    capacity.leave(ahead, time.monotonic())
    await drained
