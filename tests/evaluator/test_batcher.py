"""The batcher's invariants, as they stand above its loop, under any order of arrivals, departures and failures."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atserving.errors import Internal, InvalidArgument, ResourceExhausted, ServingError, Unavailable
from evaluator.batcher import Batcher

POISON = -1


@dataclass
class Engine:
    """A forward pass that answers ten times the request, can be made to wait, and remembers its batches."""

    batches: list[list[int]] = field(default_factory=list)
    open: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)

    def __call__(self, requests: Sequence[int]) -> list[int | ServingError]:
        self.batches.append(list(requests))
        self.entered.set()
        assert self.open.wait(30)
        if any(request < 0 for request in requests):
            raise Internal("poisoned")
        return [request * 10 for request in requests]


@asynccontextmanager
async def running(
    forward: Callable[[Sequence[int]], Sequence[int | ServingError]],
    batch_size: int = 4,
    max_concurrent: int = 1000,
    delay_s: float = 0.0,
) -> AsyncIterator[Batcher[int, int]]:
    batcher: Batcher[int, int] = Batcher(forward, batch_size, max_concurrent=max_concurrent, delay_s=delay_s)
    loop = asyncio.create_task(batcher.run())
    try:
        yield batcher
    finally:
        loop.cancel()
        await asyncio.wait({loop})


async def ask(batcher: Batcher[int, int], request: int) -> int:
    with batcher.hold():
        return (await batcher.submit(request)).value


async def until(condition: Callable[[], object]) -> None:
    """Returns once it holds; the test's own timeout bounds it."""
    while not condition():  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0)


@dataclass(frozen=True)
class Ask:
    """Several requests at once, some of them poisoned."""

    poisoned: tuple[bool, ...]


@dataclass(frozen=True)
class Leave:
    who: int


STEPS = st.lists(
    st.one_of(
        st.builds(Ask, st.lists(st.sampled_from([False, False, False, True]), min_size=2, max_size=8).map(tuple)),
        st.builds(Leave, st.integers(0, 30)),
        st.sampled_from(["turn", "open", "close", "engine"]),
    ),
    min_size=5,
    max_size=30,
)


class Play:
    """Plays steps against a batcher and keeps the books."""

    def __init__(self, batcher: Batcher[int, int], engine: Engine) -> None:
        self.batcher = batcher
        self.engine = engine
        self.tasks: dict[int, asyncio.Task[int]] = {}
        self.left_waiting: set[int] = set()

    async def step(self, step: object) -> None:
        match step:
            case Ask(poisoned):
                for bad in poisoned:
                    number = len(self.tasks) + 1
                    request = -number if bad else number
                    self.tasks[request] = asyncio.create_task(ask(self.batcher, request))
            case Leave(who) if self.tasks:
                request = list(self.tasks)[who % len(self.tasks)]
                # With the engine shut and a batch in it, what it has not been given is known to wait.
                shut = self.engine.entered.is_set() and not self.engine.open.is_set()
                if shut and all(request not in batch for batch in self.engine.batches):
                    self.left_waiting.add(request)
                self.tasks[request].cancel()
            case "turn":
                await asyncio.sleep(0)
            case "open":
                self.engine.open.set()
            case "close":
                self.engine.open.clear()
                self.engine.entered.clear()
            case "engine" if self.engine.open.is_set() and self.tasks:
                await asyncio.wait(self.tasks.values(), return_when=asyncio.FIRST_COMPLETED)


@settings(max_examples=150, deadline=None)
@given(
    steps=STEPS, batch_size=st.integers(1, 5), max_concurrent=st.integers(1, 12), delay_ms=st.sampled_from([0, 0, 1])
)
async def test_nothing_is_lost_mixed_up_or_over_its_bounds(
    steps: list[object], batch_size: int, max_concurrent: int, delay_ms: int
) -> None:
    engine = Engine()
    async with running(engine, batch_size, max_concurrent, delay_ms / 1000) as batcher:
        play = Play(batcher, engine)
        for step in steps:
            await play.step(step)
            assert 0 <= batcher.held <= max_concurrent
        engine.open.set()
        outcomes = await asyncio.gather(*play.tasks.values(), return_exceptions=True)
        assert batcher.held == 0

    refused = 0
    for request, outcome in zip(play.tasks, outcomes, strict=True):
        runs = [batch for batch in engine.batches if request in batch]
        if isinstance(outcome, ResourceExhausted):
            refused += 1
            assert outcome.refused
            assert (outcome.retry_after_s or 0) > 0
            assert runs == []
        elif isinstance(outcome, asyncio.CancelledError):
            assert request not in play.left_waiting or runs == []
        elif request < 0:
            assert isinstance(outcome, Internal)
            assert runs[-1] == [request]
        else:
            assert outcome == request * 10
            # Once, or in a batch that failed and then once more, alone.
            assert len(runs) == 1 or (min(runs[0]) < 0 and runs[1:] == [[request]])
    assert refused == 0 or len(play.tasks) > max_concurrent
    assert all(1 <= len(batch) <= batch_size for batch in engine.batches)


async def test_a_free_engine_takes_what_has_queued_in_order_and_never_more_than_a_batch() -> None:
    engine = Engine()
    async with running(engine, batch_size=4) as batcher:
        first = asyncio.create_task(ask(batcher, 1))
        await until(engine.entered.is_set)
        rest = [asyncio.create_task(ask(batcher, number)) for number in range(2, 8)]
        await asyncio.sleep(0)
        engine.open.set()
        assert await asyncio.gather(first, *rest) == [10, 20, 30, 40, 50, 60, 70]
    assert engine.batches == [[1], [2, 3, 4, 5], [6, 7]]


async def test_the_event_loop_runs_on_during_a_forward_pass() -> None:
    engine = Engine()
    async with running(engine) as batcher:
        asking = asyncio.create_task(ask(batcher, 1))
        await until(engine.entered.is_set)
        engine.open.set()
        assert await asking == 10


async def test_a_request_that_leaves_the_queue_frees_its_place_and_never_runs() -> None:
    engine = Engine()
    async with running(engine, batch_size=1, max_concurrent=2) as batcher:
        running_one = asyncio.create_task(ask(batcher, 1))
        await until(engine.entered.is_set)
        waiting = asyncio.create_task(ask(batcher, 2))
        await until(lambda: batcher.held == 2)
        with pytest.raises(ResourceExhausted):
            await ask(batcher, 3)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert batcher.held == 1
        successor = asyncio.create_task(ask(batcher, 4))
        await until(lambda: batcher.held == 2)
        engine.open.set()
        assert list(await asyncio.gather(running_one, successor)) == [10, 40]
    assert engine.batches == [[1], [4]]


async def test_a_deadline_that_passes_in_the_queue_takes_the_request_out() -> None:
    engine = Engine()
    async with running(engine, batch_size=1) as batcher:
        running_one = asyncio.create_task(ask(batcher, 1))
        await until(engine.entered.is_set)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await ask(batcher, 2)
        engine.open.set()
        await running_one
    assert engine.batches == [[1]]


async def test_an_answer_to_a_caller_that_left_during_its_pass_is_dropped_and_the_others_are_answered() -> None:
    engine = Engine()
    async with running(engine, batch_size=2, delay_s=60) as batcher:
        tasks = [asyncio.create_task(ask(batcher, number)) for number in (1, 2)]
        await until(engine.entered.is_set)
        tasks[0].cancel()
        engine.open.set()
        assert await tasks[1] == 20
    assert engine.batches == [[1, 2]]


async def test_with_a_delay_an_idle_engine_waits_for_a_full_batch() -> None:
    engine = Engine()
    engine.open.set()
    async with running(engine, batch_size=3, delay_s=60) as batcher:
        tasks = [asyncio.create_task(ask(batcher, number)) for number in (1, 2)]
        await until(lambda: batcher.held == 2)
        assert engine.batches == []
        assert await ask(batcher, 3) == 30
        await asyncio.gather(*tasks)
    assert engine.batches == [[1, 2, 3]]


async def test_with_a_delay_a_batch_that_does_not_fill_runs_in_the_end() -> None:
    engine = Engine()
    engine.open.set()
    async with running(engine, batch_size=3, delay_s=0.01) as batcher:
        assert await ask(batcher, 1) == 10


async def test_a_shorter_delay_applies_to_what_already_waits() -> None:
    engine = Engine()
    engine.open.set()
    async with running(engine, batch_size=3, delay_s=3600) as batcher:
        task = asyncio.create_task(ask(batcher, 1))
        await until(lambda: batcher.held == 1)
        batcher.configure(max_concurrent=5, delay_s=0)
        assert await task == 10


async def test_places_can_be_made_more_and_fewer() -> None:
    engine = Engine()
    async with running(engine, batch_size=1, max_concurrent=1) as batcher:
        tasks = [asyncio.create_task(ask(batcher, 1))]
        await until(engine.entered.is_set)
        with pytest.raises(ResourceExhausted):
            await ask(batcher, 2)
        batcher.configure(max_concurrent=2, delay_s=0)
        tasks.append(asyncio.create_task(ask(batcher, 3)))
        await until(lambda: batcher.held == 2)
        batcher.configure(max_concurrent=1, delay_s=0)
        with pytest.raises(ResourceExhausted):
            await ask(batcher, 4)
        engine.open.set()
        assert await asyncio.gather(*tasks) == [10, 30]


async def test_a_request_at_fault_fails_alone_with_its_own_error() -> None:
    def forward(requests: Sequence[int]) -> list[int | ServingError]:
        return [InvalidArgument(f"not {request}") if request == 2 else request for request in requests]

    async with running(forward, batch_size=3, delay_s=60) as batcher:
        one, two, three = await asyncio.gather(*(ask(batcher, n) for n in (1, 2, 3)), return_exceptions=True)
    assert [one, three] == [1, 3]
    assert isinstance(two, InvalidArgument)
    assert str(two) == "not 2"


async def test_a_forward_pass_that_loses_a_request_is_an_error_not_another_ones_answer() -> None:
    async with running(lambda requests: list(requests)[1:], batch_size=2, delay_s=60) as batcher:
        outcomes = await asyncio.gather(ask(batcher, 1), ask(batcher, 2), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Internal, Internal]


async def test_what_is_said_of_when_to_come_back_grows_with_the_queue() -> None:
    engine = Engine()
    engine.open.set()
    async with running(engine, batch_size=1, max_concurrent=0) as batcher:

        async def retry_after_s(places: int) -> float:
            batcher.configure(max_concurrent=places, delay_s=0)
            engine.open.clear()
            tasks = [asyncio.create_task(ask(batcher, 1)) for _ in range(places)]
            await until(lambda: batcher.held == places)
            with pytest.raises(ResourceExhausted) as refusal:
                await ask(batcher, 2)
            engine.open.set()
            await asyncio.gather(*tasks)
            return refusal.value.retry_after_s or 0

        batcher.configure(max_concurrent=1, delay_s=0)
        assert await ask(batcher, 1) == 10
        assert 0 < await retry_after_s(1) <= await retry_after_s(5000)


async def test_draining_refuses_new_requests_and_finishes_those_held_without_waiting_for_a_batch() -> None:
    engine = Engine()
    engine.open.set()
    async with running(engine, batch_size=4, delay_s=3600) as batcher:
        task = asyncio.create_task(ask(batcher, 1))
        await until(lambda: batcher.held == 1)
        batcher.drain()
        with pytest.raises(Unavailable) as refusal:
            await ask(batcher, 2)
        assert refusal.value.refused
        await batcher.drained()
        assert await task == 10


async def test_what_is_held_when_the_batcher_stops_is_told_so() -> None:
    engine = Engine()
    async with running(engine, batch_size=1) as batcher:
        tasks = [asyncio.create_task(ask(batcher, number)) for number in (1, 2)]
        await until(engine.entered.is_set)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    engine.open.set()
    assert [type(outcome) for outcome in outcomes] == [Unavailable, Unavailable]
