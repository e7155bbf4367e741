"""The capacity of an instance bounds its requests in flight, and refuses any further request."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atserving.errors import ResourceExhausted, Unavailable
from evaluator.serving.capacity import Capacity
from tests.waiting import until


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


async def fetching(capacity: Capacity, hosts: str, fetched: asyncio.Event) -> None:
    async with capacity.fetch(hosts):
        await fetched.wait()


async def test_fetches_have_places_of_their_own_and_a_host_half_of_them() -> None:
    capacity, fetched = Capacity(4), asyncio.Event()
    running = [asyncio.create_task(fetching(capacity, host, fetched)) for host in "aabb"]
    await asyncio.sleep(0)
    assert (capacity.fetching, capacity.in_flight) == (4, 0)
    for _ in range(4):
        capacity.enter()
    with pytest.raises(ResourceExhausted, match="fetches the resources of 4 requests, which is its limit"):
        await fetching(capacity, "c", fetched)
    running[3].cancel()
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted, match="fetches the resources of 2 requests from this host"):
        await fetching(capacity, "a", fetched)
    running[3] = asyncio.create_task(fetching(capacity, "c", fetched))
    await asyncio.sleep(0)
    fetched.set()
    # What has been fetched waits for a place.
    early, _ = await asyncio.wait(running, timeout=0.05)
    assert not early
    assert (capacity.fetching, capacity.in_flight) == (4, 4)
    for done in range(1, 5):
        capacity.leave(4, time.monotonic())
        await until(lambda done=done: sum(each.done() for each in running) == done)  # type: ignore[misc]
        assert (capacity.fetching, capacity.in_flight) == (4 - done, 4)
    for _ in range(4):
        capacity.leave(4, time.monotonic())
    await capacity.drained()


async def test_a_request_counts_for_each_of_its_hosts() -> None:
    capacity, fetched = Capacity(4), asyncio.Event()
    running = [asyncio.create_task(fetching(capacity, hosts, fetched)) for hosts in ("ab", "cb")]
    await asyncio.sleep(0)
    assert capacity.fetching == 2
    with pytest.raises(ResourceExhausted, match="fetches the resources of 2 requests from this host"):
        await fetching(capacity, "db", fetched)
    running.append(asyncio.create_task(fetching(capacity, "ac", fetched)))
    await asyncio.sleep(0)
    assert capacity.fetching == 3
    for each in running:
        each.cancel()
    await asyncio.wait(running)
    await capacity.drained()
    running = [asyncio.create_task(fetching(capacity, "b", fetched)) for _ in range(2)]
    fetched.set()
    await asyncio.gather(*running)
    assert (capacity.fetching, capacity.in_flight) == (0, 2)


async def test_a_fetched_request_that_leaves_gives_its_place_back() -> None:
    capacity, fetched = Capacity(2), asyncio.Event()
    fetched.set()
    for _ in range(2):
        capacity.enter()
    waiting, next_one = (asyncio.create_task(fetching(capacity, host, fetched)) for host in "ab")
    await asyncio.sleep(0)
    # It has been given the place, and leaves before it learns of it.
    capacity.leave(1, time.monotonic())
    waiting.cancel()
    await asyncio.wait([waiting, next_one])
    assert waiting.cancelled()
    assert (capacity.fetching, capacity.in_flight) == (0, 2)
    for _ in range(2):
        capacity.leave(1, time.monotonic())
    await capacity.drained()


def test_tasks_of_batches_leave_a_quarter_to_others() -> None:
    capacity = Capacity(8)
    for _ in range(6):
        capacity.enter(batched=True)
    with pytest.raises(ResourceExhausted, match="6 requests in flight, which is its limit for tasks of batches"):
        capacity.enter(batched=True)
    capacity.enter()
    assert capacity.enter() == 8
    with pytest.raises(ResourceExhausted, match="which is its limit"):
        capacity.enter()


def test_an_instance_for_one_request_takes_tasks_of_batches() -> None:
    capacity = Capacity(1)
    assert capacity.enter(batched=True) == 1


async def test_fetched_tasks_of_batches_wait_behind_others() -> None:
    capacity = Capacity(4)
    entered: list[str] = []

    async def fetch(name: str, batched: bool) -> None:
        async with capacity.fetch({name}, batched=batched):
            pass
        entered.append(name)

    for _ in range(4):
        capacity.enter()
    async with asyncio.TaskGroup() as group:
        for name, batched in (("first", True), ("second", True), ("third", False)):
            group.create_task(fetch(name, batched))
        await until(lambda: capacity.fetching == 3)
        capacity.leave(1, time.monotonic())
        await until(lambda: entered == ["third"])
        capacity.leave(1, time.monotonic())
        # A task of a batch may be the third, but not the fourth.
        await until(lambda: capacity.in_flight == 3)
        assert entered == ["third"]
        capacity.leave(1, time.monotonic())
        await until(lambda: entered == ["third", "first"])
        capacity.leave(1, time.monotonic())
