"""How much each caller may ask: rates, requests in flight, bytes, and what the refusals say."""

from __future__ import annotations

import asyncio

import pytest

from atserving.config import AppMetadata, validate
from atserving.errors import ResourceExhausted
from atserving.v1 import evaluator_pb2, serving_pb2
from gate import edge, limits
from gate.admission import Caller
from gate.batch import run_batch
from gate.bodies import Body
from gate.dispatch import CallContext, Task
from gate.limits import CallerLimits, Limits
from tests.gate.test_dispatch import Evaluator, running_mesh, task
from tests.waiting import until

METADATA = "/ava/serving/app/metadata/app"
ADA, PAT = Caller(1, proven=True), Caller(2, proven=True)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def taken(callers: CallerLimits, wanted: Limits, count: int, uid: int | None = 1, size: int = 0) -> int:
    """Return how many of some requests at once are let in, one after another."""
    let_in = 0
    for _ in range(count):
        try:
            callers.enter("app", uid, wanted, lambda: size).in_flight -= 1
            let_in += 1
        except ResourceExhausted:
            pass
    return let_in


@pytest.mark.parametrize(("rate", "at_once", "later_s", "later"), [(10, 10, 0.5, 5), (1, 1, 3.0, 1), (0.1, 1, 10, 1)])
def test_a_rate_lets_a_second_of_requests_come_at_once(
    clock: Clock, rate: float, at_once: int, later_s: float, later: int
) -> None:
    callers = CallerLimits(clock)
    assert taken(callers, Limits(rate), 50) == at_once
    # Each caller by itself, and all strangers together.
    assert taken(callers, Limits(rate), 50, uid=2) == at_once
    assert taken(callers, Limits(rate), 50, uid=None) == at_once
    clock.now_s += later_s
    assert taken(callers, Limits(rate), 50) == later


def test_no_more_comes_in_any_time_than_the_rate_allows(clock: Clock) -> None:
    callers, let_in = CallerLimits(clock), 0
    for _ in range(1000):
        let_in += taken(callers, Limits(7), 3)
        clock.now_s += 0.05
    assert 7 * 50 <= let_in <= 7 * 51


def test_a_higher_limit_counts_at_once(clock: Clock) -> None:
    callers = CallerLimits(clock)
    assert taken(callers, Limits(0.001), 2) == 1
    assert taken(callers, Limits(10), 20) == 10


def test_a_refusal_says_when_to_come_again(clock: Clock) -> None:
    callers = CallerLimits(clock)
    assert taken(callers, Limits(4), 4) == 4
    with pytest.raises(ResourceExhausted, match="more than 4 requests a second") as refused:
        callers.enter("app", 1, Limits(4), lambda: 0)
    assert refused.value.retry_after_s == pytest.approx(0.25)
    assert dict(edge.rate_limit(refused.value)) == {
        "ratelimit-policy": '"requests";q=4;w=1',
        "ratelimit": '"requests";r=0;t=1',
    }
    clock.now_s += refused.value.retry_after_s or 0
    assert taken(callers, Limits(4), 2) == 1


def test_bytes_a_minute(clock: Clock) -> None:
    callers, wanted = CallerLimits(clock), Limits(bytes_per_minute=1000)
    assert taken(callers, wanted, 9, size=250) == 4
    with pytest.raises(ResourceExhausted, match="more than 1000 bytes a minute") as refused:
        callers.enter("app", 1, wanted, lambda: 500)
    assert refused.value.retry_after_s == pytest.approx(30)
    clock.now_s += 15
    assert taken(callers, wanted, 2, size=250) == 1
    clock.now_s += 60
    # One that is larger than all of it comes alone.
    assert taken(callers, wanted, 2, size=5000) == 1


def test_what_is_refused_costs_nothing(clock: Clock) -> None:
    callers, wanted = CallerLimits(clock), Limits(10, 0, 1000)
    assert taken(callers, wanted, 1, size=1000) == 1
    assert taken(callers, wanted, 50, size=10) == 0
    clock.now_s += 60
    assert taken(callers, wanted, 50, size=0) == 10


def test_callers_who_have_gone_are_forgotten(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_FEW", 100)
    callers = CallerLimits(clock)
    busy = callers.enter("app", -1, Limits(in_flight=1), lambda: 0)
    for uid in range(1000):
        callers.enter("app", uid, Limits(10), lambda: 0).in_flight -= 1
        clock.now_s += 0.2
    assert len(callers) <= 201
    # One with a request in flight is not.
    with pytest.raises(ResourceExhausted, match="in flight"):
        callers.enter("app", -1, Limits(in_flight=1), lambda: 0)
    busy.in_flight -= 1
    # Those who still owe are not.
    for uid in range(1000):
        callers.enter("other", uid, Limits(0.001), lambda: 0).in_flight -= 1
    assert taken(callers, Limits(0.001), 1, uid=0) == 1
    with pytest.raises(ResourceExhausted):
        callers.enter("other", 0, Limits(0.001), lambda: 0)


def test_the_limits_of_an_app_come_before_those_of_all() -> None:
    own = AppMetadata(max_in_flight=3)
    default = AppMetadata(max_in_flight=5, max_requests_per_second=2.0)
    assert Limits.of(own, default) == Limits(2.0, 3, 0)
    assert Limits.of(AppMetadata(public=True), AppMetadata()) is None


async def test_requests_in_flight() -> None:
    async with running_mesh() as mesh:
        hold = asyncio.Event()
        await mesh.add(Evaluator("a", hold=hold))
        mesh.put(METADATA, validate(AppMetadata, {"max_in_flight": 2}))
        waiting = [asyncio.create_task(mesh.dispatcher.eval(task(), CallContext(f"r{n}", ADA))) for n in range(3)]
        await until(lambda: any(each.done() for each in waiting))
        (refused,) = (each for each in waiting if each.done())
        with pytest.raises(ResourceExhausted, match="this caller has 2 requests to app 'app' in flight"):
            await refused
        others = asyncio.create_task(mesh.dispatcher.eval(task(), CallContext("other", PAT)))
        hold.set()
        await asyncio.gather(others, *(each for each in waiting if each is not refused))
        await mesh.dispatcher.eval(task(), CallContext("later", ADA))
        # A change is followed at once, and an end of limits.
        mesh.put(METADATA, validate(AppMetadata, {"max_requests_per_second": 0.001}))
        await mesh.dispatcher.eval(task(), CallContext("one", ADA))
        with pytest.raises(ResourceExhausted, match="a second"):
            await mesh.dispatcher.eval(task(), CallContext("two", ADA))
        mesh.put(METADATA, AppMetadata())
        await mesh.dispatcher.eval(task(), CallContext("three", ADA))


async def test_a_large_body_counts() -> None:
    async with running_mesh() as mesh:
        await mesh.add(Evaluator("a"))
        mesh.put(METADATA, validate(AppMetadata, {"max_bytes_per_minute": 100_000}))
        large = Task("app", "", evaluator_pb2.InferRequest(), Body([bytes(90_000)]))
        small = evaluator_pb2.InferRequest(data=[serving_pb2.Resource(body=bytes(20_000))])
        await mesh.dispatcher.eval(large, CallContext("one", ADA))
        with pytest.raises(ResourceExhausted, match="bytes a minute"):
            await mesh.dispatcher.eval(Task("app", "", small), CallContext("two", ADA))


async def test_the_tasks_of_a_batch_keep_to_the_limits() -> None:
    async with running_mesh() as mesh:
        evaluator = Evaluator("a")
        await mesh.add(evaluator)
        mesh.put(METADATA, validate(AppMetadata, {"max_in_flight": 2, "max_requests_per_second": 1000}))
        call = CallContext("batch", ADA)
        results = await run_batch(mesh.dispatcher, [task() for _ in range(20)], call, 8, mesh.held)
        assert not [each for each in results if isinstance(each, Exception)]
        assert evaluator.most_in_flight <= 2


async def test_an_attempt_of_a_batch_that_finds_no_place_costs_nothing() -> None:
    refusal = evaluator_pb2.Error(code=429, status=429, message="full", refused=True)
    async with running_mesh() as mesh:
        evaluator = Evaluator("a", error=refusal)
        await mesh.add(evaluator)
        mesh.put(METADATA, validate(AppMetadata, {"max_requests_per_second": 0.001}))
        call = CallContext("batch", ADA, batched=True)
        for _ in range(3):
            with pytest.raises(ResourceExhausted, match=r"full|room"):
                await mesh.dispatcher.eval(task(), call)
