"""Real threads under the batcher: each request gets one answer, its own, whatever the others do."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atserving.errors import DeadlineExceeded, Internal, InvalidArgument, ServingError
from evaluator.worker.batcher import Batcher, ItemResult
from evaluator.worker.schedule import Item, Schedule

WAIT_S = 30.0


class Engine:
    """Answers ten times the request; a negative one fails its batch, and "bad" can't be prepared."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = threading.Event()
        self.entered = threading.Event()
        self.open.set()

    def prepare(self, item: Item) -> Any:
        if item.request == "bad":
            raise InvalidArgument("bad")
        if item.request == "worse":
            raise ValueError("worse")
        return item.request

    def infer(self, prepared: Sequence[int]) -> tuple[list[int | ServingError], float]:
        self.batches.append(list(prepared))
        self.entered.set()
        assert self.open.wait(WAIT_S)
        if any(request < 0 for request in prepared):
            raise Internal("poisoned")
        if 777 in prepared:
            return [1], 0.0
        return [InvalidArgument("its own") if each == 666 else each * 10 for each in prepared], 0.001


class Books:
    """A batcher with threads of its own, the answers that came, and who is written down as at work."""

    ids = itertools.count(1)

    def __init__(self, *, lanes: int = 0, helpers: int = 0, batch_size: int = 4, delay_s: float = 0.0) -> None:
        self.engine = Engine()
        self.answers: dict[int, list[ItemResult]] = {}
        self.at_work: dict[int, list[int]] = {}
        self.changed = threading.Condition()
        schedule = Schedule(batch_size=batch_size, engines=max(lanes, 1), delay_s=delay_s)
        self.batcher = Batcher(schedule, self.engine, self.answered, self, lanes=bool(lanes))
        roles = [(True, True)] * lanes or [(True, False), (False, True), (False, True)]
        roles += [(False, True)] * helpers
        for number, (forwards, prepares) in enumerate(roles):
            arguments = {"forwards": forwards, "prepares": prepares}
            threading.Thread(target=self.batcher.run, args=(number,), kwargs=arguments, daemon=True).start()

    def begin(self, thread: int, ids: Sequence[int], *, preparing: bool) -> None:
        assert thread not in self.at_work
        self.at_work[thread] = list(ids)

    def end(self, thread: int) -> None:
        del self.at_work[thread]

    def answered(self, answers: Sequence[ItemResult]) -> None:
        with self.changed:
            for answer in answers:
                self.answers.setdefault(answer.item.id, []).append(answer)
            self.changed.notify_all()

    def submit(self, *requests: Any, lives_s: float = 1000.0) -> list[Item]:
        now_s = time.monotonic()
        items = [Item(next(self.ids), request, now_s, now_s + lives_s) for request in requests]
        self.batcher.submit(items)
        return items

    def outcomes(self, items: Sequence[Item]) -> list[Any]:
        with self.changed:
            assert self.changed.wait_for(lambda: all(item.id in self.answers for item in items), WAIT_S)
        for item in items:
            assert len(self.answers[item.id]) == 1
        return [self.answers[item.id][0].outcome for item in items]

    def ask(self, *requests: Any) -> list[Any]:
        return self.outcomes(self.submit(*requests))


@pytest.fixture(scope="module", params=["lanes", "specialists", "a lane and its help"])
def books(request: pytest.FixtureRequest) -> Books:
    match request.param:
        case "lanes":
            return Books(lanes=2)
        case "specialists":
            return Books()
    books = Books(lanes=1, helpers=2)
    # As if every preparation took long.
    books.batcher._prepare_s = 1e6
    return books


REQUESTS = st.lists(st.one_of(st.integers(0, 99), st.sampled_from([-1, -2, 666, "bad", "worse"])), max_size=12)


@settings(max_examples=150, deadline=None)
@given(bursts=st.lists(REQUESTS, max_size=4), gone=st.sets(st.integers(0, 40)))
def test_nothing_is_lost_or_mixed_up(books: Books, bursts: list[list[Any]], gone: set[int]) -> None:
    books.engine.batches.clear()
    items = [item for burst in bursts for item in books.submit(*burst)]
    left = {items[who].id for who in gone if who < len(items)}
    books.batcher.cancel(left)
    for item, outcome in zip(items, books.outcomes(items), strict=True):
        if item.id in left and isinstance(outcome, DeadlineExceeded):
            continue
        match item.request:
            case "bad" | 666:
                assert isinstance(outcome, InvalidArgument)
            case "worse":
                assert isinstance(outcome, Internal)
            case request if request < 0:
                assert isinstance(outcome, Internal)
                assert [request] in books.engine.batches
            case request:
                assert outcome == request * 10
    assert all(1 <= len(batch) <= 4 for batch in books.engine.batches)
    # A batch that failed ran again one by one, and nothing else ran twice.
    assert books.at_work == {} or all(books.at_work.values())


def test_a_forward_pass_that_loses_a_request_is_an_error_not_another_ones_answer() -> None:
    books = Books(batch_size=2, delay_s=60)
    assert [type(outcome) for outcome in books.ask(777, 5)] == [int, int]
    # Alone each is answered: only together did they come to one answer.
    assert books.engine.batches == [[777, 5], [777], [5]]


def test_a_batch_is_what_gathered_while_the_engine_was_busy() -> None:
    books = Books(batch_size=4)
    books.engine.open.clear()
    first = books.submit(1)
    assert books.engine.entered.wait(WAIT_S)
    rest = books.submit(2, 3, 4)
    deadline_s = time.monotonic() + WAIT_S
    while books.batcher._schedule.ready < 3:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    books.engine.open.set()
    assert books.outcomes([*first, *rest]) == [10, 20, 30, 40]
    assert [sorted(batch) for batch in books.engine.batches] == [[1], [2, 3, 4]]


def test_the_next_batch_is_prepared_while_one_runs() -> None:
    books = Books(batch_size=4)
    books.engine.open.clear()
    running = books.submit(1)
    assert books.engine.entered.wait(WAIT_S)
    bad = books.submit("bad")
    assert isinstance(books.outcomes(bad)[0], InvalidArgument)
    books.engine.open.set()
    books.outcomes(running)


@pytest.mark.parametrize("lanes", [0, 1])
def test_what_has_expired_or_left_never_runs(lanes: int) -> None:
    books = Books(lanes=lanes, batch_size=1)
    books.engine.open.clear()
    running = books.submit(1)
    assert books.engine.entered.wait(WAIT_S)
    gone = books.submit(2)
    expired = books.submit(3, lives_s=0)
    books.batcher.cancel([gone[0].id])
    books.engine.open.set()
    assert books.outcomes(running) == [10]
    assert [type(each) for each in books.outcomes([*gone, *expired])] == [DeadlineExceeded] * 2
    assert books.engine.batches == [[1]]


def test_a_shorter_delay_applies_to_what_already_waits() -> None:
    books = Books(batch_size=3, delay_s=3600)
    items = books.submit(1)
    books.batcher.configure(delay_s=0)
    assert books.outcomes(items) == [10]


def test_stages_add_up() -> None:
    books = Books(batch_size=2, delay_s=60)
    items = books.submit(1, 2)
    books.outcomes(items)
    for item in items:
        (answer,) = books.answers[item.id]
        assert (answer.batch_size, answer.forward_s) == (2, 0.001)
        assert answer.queue_s >= 0
        assert item.prepare_s >= 0


def test_those_that_only_prepare_help_a_lane_where_that_takes_long() -> None:
    books = Books(lanes=1, helpers=1)
    books.engine.open.clear()
    running = books.submit(1)
    assert books.engine.entered.wait(WAIT_S)
    quick = books.submit("bad")
    books.batcher._prepare_s = 1e6
    slow = books.submit("bad")
    # The lane runs its batch all the while.
    assert [type(each) for each in books.outcomes([*slow, *quick])] == [InvalidArgument] * 2
    books.engine.open.set()
    assert books.outcomes(running) == [10]


def test_what_goes_while_a_lane_prepares_others_is_not_prepared() -> None:
    books = Books(lanes=1, batch_size=8)
    asked: list[object] = []
    going = threading.Event()

    def prepare(item: Item) -> object:
        asked.append(item.request)
        going.set()
        assert books.engine.open.wait(WAIT_S)
        return item.request

    books.engine.prepare = prepare  # type: ignore[method-assign]
    books.engine.open.clear()
    items = books.submit(1, 2, 3)
    assert going.wait(WAIT_S)
    books.batcher.cancel([items[1].id])
    items[2].expires_s = 0
    books.engine.open.set()
    outcomes = books.outcomes(items)
    assert outcomes[0] == 10
    assert [type(each) for each in outcomes[1:]] == [DeadlineExceeded] * 2
    assert asked == [1]
