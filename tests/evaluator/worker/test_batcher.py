"""The batcher gives each request one result, its own, even if others fail. The tests run it with real threads."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atserving.errors import DeadlineExceeded, Internal, InvalidArgument, ServingError
from evaluator.worker.batcher import Batcher, ItemResult
from evaluator.worker.schedule import Item, Schedule
from tests.evaluator.scripts import wait_for

WAIT_S = 30.0


class Engine:
    """Work whose result is ten times the request. A negative request fails its batch; "bad" fails its preparation."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.unblocked = threading.Event()
        self.entered = threading.Event()
        self.unblocked.set()

    def prepare(self, item: Item) -> Any:
        if item.request == "bad":
            raise InvalidArgument("bad")
        if item.request == "worse":
            raise ValueError("worse")
        return item.request

    def infer(self, prepared: Sequence[int]) -> tuple[list[int | ServingError], float]:
        self.batches.append(list(prepared))
        self.entered.set()
        assert self.unblocked.wait(WAIT_S)
        if any(request < 0 for request in prepared):
            raise Internal("poisoned")
        if 777 in prepared:
            return [1], 0.0
        return [InvalidArgument("its own") if each == 666 else each * 10 for each in prepared], 0.001


class Inlet:
    """Requests on their way to a batcher that reads them itself."""

    def __init__(self) -> None:
        self.batcher: Batcher | None = None
        self._arrived: deque[list[Item]] = deque()
        self._changed = threading.Condition()
        self._notified = False

    def put(self, items: list[Item]) -> None:
        with self._changed:
            self._arrived.append(items)
            self._changed.notify()

    def take(self) -> None:
        assert self.batcher
        while self._arrived:
            self.batcher.submit(self._arrived.popleft())

    def wait(self, timeout_s: float | None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or self._notified, timeout_s)
            self._notified = False
        self.take()

    def notify(self) -> None:
        with self._changed:
            self._notified = True
            self._changed.notify()


class Harness:
    """A batcher with threads of its own, its results by request, and the requests that its threads work on."""

    ids = itertools.count(1)

    def __init__(
        self,
        *,
        lanes: int = 0,
        preparers: int = 0,
        batch_size: int = 4,
        delay_s: float = 0.0,
        inlet: Inlet | None = None,
    ) -> None:
        self.inlet = inlet
        self.engine = Engine()
        self.results: dict[int, list[ItemResult]] = {}
        self.in_progress: dict[int, list[int]] = {}
        self.changed = threading.Condition()
        schedule = Schedule(batch_size=batch_size, engines=max(lanes, 1), delay_s=delay_s)
        self.batcher = Batcher(schedule, self.engine, self.report, self, lanes=bool(lanes), inlet=inlet)
        if inlet:
            inlet.batcher = self.batcher
        roles = [(True, True)] * lanes or [(True, False), (False, True), (False, True)]
        roles += [(False, True)] * preparers
        for number, (forwards, prepares) in enumerate(roles):
            arguments = {"forwards": forwards, "prepares": prepares}
            threading.Thread(target=self.batcher.run, args=(number,), kwargs=arguments, daemon=True).start()

    def begin(self, thread: int, ids: Sequence[int], *, preparing: bool) -> None:
        assert thread not in self.in_progress
        self.in_progress[thread] = list(ids)

    def end(self, thread: int) -> None:
        del self.in_progress[thread]

    def report(self, results: Sequence[ItemResult]) -> None:
        with self.changed:
            for result in results:
                self.results.setdefault(result.item.id, []).append(result)
            self.changed.notify_all()

    def submit(self, *requests: Any, lives_s: float = 1000.0, batched: bool = False) -> list[Item]:
        now_s = time.monotonic()
        items = [Item(next(self.ids), request, now_s, now_s + lives_s, batched=batched) for request in requests]
        if self.inlet:
            self.inlet.put(items)
        else:
            self.batcher.submit(items)
        return items

    def outcomes(self, items: Sequence[Item]) -> list[Any]:
        with self.changed:
            assert self.changed.wait_for(lambda: all(item.id in self.results for item in items), WAIT_S)
        for item in items:
            assert len(self.results[item.id]) == 1, "a request got several results"
        return [self.results[item.id][0].outcome for item in items]

    def ask(self, *requests: Any) -> list[Any]:
        return self.outcomes(self.submit(*requests))


@pytest.fixture(
    scope="module",
    params=[
        "lanes",
        "engines and preparers",
        "lane with preparers",
        "reading lane",
        "reading lanes",
        "reading lane with preparers",
    ],
)
def harness(request: pytest.FixtureRequest) -> Harness:
    match request.param:
        case "lanes":
            return Harness(lanes=2)
        case "engines and preparers":
            return Harness()
        case "reading lane":
            return Harness(lanes=1, inlet=Inlet())
        case "reading lanes":
            return Harness(lanes=3, inlet=Inlet())
    harness = Harness(lanes=1, preparers=2, inlet=Inlet() if request.param == "reading lane with preparers" else None)
    # The batcher believes that preparations take long.
    harness.batcher._prepare_s = 1e6
    return harness


REQUESTS = st.lists(st.one_of(st.integers(0, 99), st.sampled_from([-1, -2, 666, "bad", "worse"])), max_size=12)


@settings(max_examples=150, deadline=None)
@given(bursts=st.lists(REQUESTS, max_size=4), cancelled=st.sets(st.integers(0, 40)))
def test_each_request_gets_its_own_result(harness: Harness, bursts: list[list[Any]], cancelled: set[int]) -> None:
    harness.engine.batches.clear()
    items = [item for burst in bursts for item in harness.submit(*burst)]
    cancelled_ids = {items[index].id for index in cancelled if index < len(items)}
    harness.batcher.cancel(cancelled_ids)
    requests = [request for burst in bursts for request in burst]
    for item, sent, outcome in zip(items, requests, harness.outcomes(items), strict=True):
        if item.id in cancelled_ids and isinstance(outcome, DeadlineExceeded):
            continue
        match sent:
            case "bad" | 666:
                assert isinstance(outcome, InvalidArgument)
            case "worse":
                assert isinstance(outcome, Internal)
            case request if request < 0:
                assert isinstance(outcome, Internal)
                # A failed batch runs again, one request at a time.
                assert [request] in harness.engine.batches
            case request:
                assert outcome == request * 10
    assert all(1 <= len(batch) <= 4 for batch in harness.engine.batches)
    assert harness.in_progress == {}


def test_batch_with_a_missing_outcome_runs_again_one_by_one() -> None:
    harness = Harness(batch_size=2, delay_s=60)
    assert [type(outcome) for outcome in harness.ask(777, 5)] == [int, int]
    assert harness.engine.batches == [[777, 5], [777], [5]]


def test_requests_that_arrive_during_a_batch_form_the_next_one() -> None:
    harness = Harness(batch_size=4)
    harness.engine.unblocked.clear()
    first = harness.submit(1)
    assert harness.engine.entered.wait(WAIT_S)
    rest = harness.submit(2, 3, 4)
    deadline_s = time.monotonic() + WAIT_S
    while harness.batcher._schedule.ready < 3:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    harness.engine.unblocked.set()
    assert harness.outcomes([*first, *rest]) == [10, 20, 30, 40]
    assert [sorted(batch) for batch in harness.engine.batches] == [[1], [2, 3, 4]]


def test_next_batch_is_prepared_while_one_runs() -> None:
    harness = Harness(batch_size=4)
    harness.engine.unblocked.clear()
    running = harness.submit(1)
    assert harness.engine.entered.wait(WAIT_S)
    bad = harness.submit("bad")
    assert isinstance(harness.outcomes(bad)[0], InvalidArgument)
    harness.engine.unblocked.set()
    harness.outcomes(running)


@pytest.mark.parametrize("lanes", [0, 1])
def test_expired_or_cancelled_request_never_runs(lanes: int) -> None:
    harness = Harness(lanes=lanes, batch_size=1)
    harness.engine.unblocked.clear()
    running = harness.submit(1)
    assert harness.engine.entered.wait(WAIT_S)
    cancelled = harness.submit(2)
    expired = harness.submit(3, lives_s=0)
    harness.batcher.cancel([cancelled[0].id])
    harness.engine.unblocked.set()
    assert harness.outcomes(running) == [10]
    assert [type(each) for each in harness.outcomes([*cancelled, *expired])] == [DeadlineExceeded] * 2
    assert harness.engine.batches == [[1]]


@pytest.mark.parametrize("inlet", [None, Inlet()])
def test_shorter_delay_applies_to_waiting_requests(inlet: Inlet | None) -> None:
    harness = Harness(batch_size=3, delay_s=3600, lanes=bool(inlet), inlet=inlet)
    items = harness.submit(1)
    harness.batcher.configure(delay_s=0, most=100)
    assert harness.outcomes(items) == [10]


@pytest.mark.parametrize("inlet", [None, Inlet()])
def test_no_request_waits_for_a_batch_that_can_not_be_full(inlet: Inlet | None) -> None:
    harness = Harness(batch_size=3, delay_s=3600, lanes=bool(inlet), inlet=inlet)
    harness.batcher.configure(delay_s=3600, most=2)
    assert harness.outcomes(harness.submit(1, 2)) == [10, 20]
    items = harness.submit(3)
    harness.batcher.configure(delay_s=3600, most=1)
    assert harness.outcomes(items) == [30]


@pytest.mark.parametrize("inlet", [None, Inlet()])
def test_no_task_of_a_batch_waits_for_the_quarter_left_to_others(inlet: Inlet | None) -> None:
    harness = Harness(batch_size=5, delay_s=3600, lanes=bool(inlet), inlet=inlet)
    harness.batcher.configure(delay_s=3600, most=4)
    for _ in range(2):
        assert harness.outcomes(harness.submit(1, 2, 3, batched=True)) == [10, 20, 30]
    # Next to another request there may come more.
    items = harness.submit(1, 2, batched=True) + harness.submit(3)
    assert not harness.results.keys() & {item.id for item in items}
    assert harness.outcomes(items + harness.submit(4)) == [10, 20, 30, 40]
    assert harness.outcomes(harness.submit(5, 6, 7, batched=True)) == [50, 60, 70]
    assert sorted(len(batch) for batch in harness.engine.batches) == [3, 3, 3, 4]


def test_result_has_the_durations_and_the_batch_size() -> None:
    harness = Harness(batch_size=2, delay_s=60)
    items = harness.submit(1, 2)
    harness.outcomes(items)
    for item in items:
        (result,) = harness.results[item.id]
        assert (result.batch_size, result.forward_s) == (2, 0.001)
        assert result.queue_s >= 0
        assert item.prepare_s >= 0


def test_preparers_help_a_busy_lane_if_preparations_take_long() -> None:
    harness = Harness(lanes=1, preparers=1)
    harness.engine.unblocked.clear()
    running = harness.submit(1)
    assert harness.engine.entered.wait(WAIT_S)
    quick = harness.submit("bad")
    harness.batcher._prepare_s = 1e6
    slow = harness.submit("bad")
    # The lane is busy with its batch.
    assert [type(each) for each in harness.outcomes([*slow, *quick])] == [InvalidArgument] * 2
    harness.engine.unblocked.set()
    assert harness.outcomes(running) == [10]


def test_request_cancelled_or_expired_behind_a_preparation_is_not_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(lanes=1, batch_size=8)
    prepared: list[object] = []
    preparing = threading.Event()

    def prepare(item: Item) -> object:
        prepared.append(item.request)
        preparing.set()
        assert harness.engine.unblocked.wait(WAIT_S)
        return item.request

    monkeypatch.setattr(harness.engine, "prepare", prepare)
    harness.engine.unblocked.clear()
    items = harness.submit(1, 2, 3)
    assert preparing.wait(WAIT_S)
    harness.batcher.cancel([items[1].id])
    items[2].expires_s = 0
    harness.engine.unblocked.set()
    outcomes = harness.outcomes(items)
    assert outcomes[0] == 10
    assert [type(each) for each in outcomes[1:]] == [DeadlineExceeded] * 2
    assert prepared == [1]


class Short(list[Item]):
    """Requests for which memory is short while they are taken in."""

    times = 0

    def __iter__(self) -> Iterator[Item]:
        self.times += 1
        for item in super().__iter__():
            yield item
            if self.times == 2:
                raise MemoryError


def test_requests_that_find_no_memory_are_not_taken_in_part() -> None:
    harness = Harness(lanes=1)
    assert not harness.batcher.submit(Short(Item(next(harness.ids), 1, time.monotonic()) for _ in range(3)))
    later = harness.submit(2)
    assert harness.outcomes(later) == [20]
    assert set(harness.results) == {later[0].id}
    assert not harness.batcher._items


class Body(str):
    """A request whose end can be seen."""

    __slots__ = ("__weakref__",)


@pytest.mark.parametrize("body", ["bad", "fine", "fails"])
def test_idle_threads_keep_no_request(body: str) -> None:
    harness = Harness(lanes=1)
    harness.engine = harness.batcher._work = KeepsNothing()
    gc.collect()
    gc.disable()
    try:
        item = Item(next(harness.ids), Body(body), time.monotonic())
        kept = weakref.ref(item.request)
        harness.batcher.submit([item])
        assert len(harness.outcomes([item])) == 1
        del item
        harness.results.clear()
        wait_for(lambda: kept() is None)
    finally:
        gc.enable()


class KeepsNothing(Engine):
    """Work on bodies."""

    def infer(self, prepared: Sequence[Any]) -> tuple[list[Any], float]:
        if "fails" in prepared:
            raise Internal("failed")
        return [1 for _ in prepared], 0.0
