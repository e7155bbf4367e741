"""The schedule keeps the invariants of its docstring in any order of arrivals, cancellations and work."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from evaluator.worker.schedule import Expired, Forward, Item, Prepare, Schedule, Wait, Work


class ScheduleMachine(RuleBasedStateMachine):
    """Requests arrive, expire and are cancelled at any time. Threads take work and end it at any time.

    The threads are either lanes, or engines and preparers.
    """

    unfinished: Bundle[Work] = Bundle("unfinished")

    @initialize(
        batch_size=st.integers(1, 4), engines=st.integers(1, 3), lanes=st.booleans(), delay_s=st.sampled_from([0, 0, 3])
    )
    def begin(self, batch_size: int, engines: int, lanes: bool, delay_s: float) -> None:
        self.schedule = Schedule(batch_size=batch_size, engines=engines, delay_s=delay_s)
        self.engines, self.lanes, self.now_s = engines, lanes, 0.0
        self.items: list[Item] = []
        self.left: Counter[int] = Counter()
        self.removed: set[int] = set()
        self.running = 0
        self.preparing = 0
        self.started: list[Work] = []

    @rule(count=st.integers(1, 6), lives_s=st.sampled_from([math.inf, math.inf, 2]))
    def arrive(self, count: int, lives_s: float) -> None:
        new = [Item(len(self.items) + number, None, self.now_s, self.now_s + lives_s) for number in range(1, count + 1)]
        self.items += new
        self.schedule.arrive(new)

    @rule(seconds=st.sampled_from([0.5, 1, 4]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(index=st.integers(0, 100))
    def cancel(self, index: int) -> None:
        waiting = [item for item in self.items if not self.left[item.id] and item.id not in self.removed]
        if waiting:
            item = waiting[index % len(waiting)]
            if self.schedule.remove(item):
                self.left[item.id] += 1
            self.removed.add(item.id)

    @rule(target=unfinished, idle=st.integers(1, 3), forwards=st.booleans())
    def take(self, idle: int, forwards: bool) -> Work | MultipleResults[Work]:
        if forwards and self.running == self.engines:
            return multiple()
        prepares = self.lanes or not forwards
        work = self.schedule.next(self.now_s, forwards=forwards, prepares=prepares, idle=idle)
        match work:
            case Expired(items):
                assert all(item.expires_s <= self.now_s for item in items)
                self.left.update(item.id for item in items)
                return multiple()
            case Forward(items):
                self.running += 1
                assert forwards
                assert 1 <= len(items) <= self.schedule.batch_size
                full, oldest_s = len(items) == self.schedule.batch_size, min(item.arrived_s for item in items)
                assert full or self.now_s >= oldest_s + self.schedule.delay_s
                for item in items:
                    assert item.prepared
                self._assert_wanted(items)
            case Prepare(items):
                self.preparing += len(items)
                assert 1 <= len(items) <= self.schedule.batch_size
                assert not any(item.prepared for item in items)
                self._assert_wanted(items)
            case Wait(until_s):
                assert until_s > self.now_s
                # A free engine waits only if nothing is ready, or if the release sets a delay.
                assert not (forwards and self.schedule.ready and self.schedule.delay_s == 0)
                # A preparing thread waits only if enough is prepared.
                assert not (prepares and self.schedule.has_arrived)
                return multiple()
        self.started.append(work)
        return work

    def _assert_wanted(self, items: list[Item]) -> None:
        for item in items:
            assert item.id not in self.removed
            assert item.expires_s > self.now_s
            assert not self.left[item.id]

    @rule(work=consumes(unfinished), fit=st.booleans())
    def end(self, work: Work, fit: bool) -> None:
        self._end(work, fit)

    def _end(self, work: Work, fit: bool) -> None:
        self.started.remove(work)
        match work:
            case Prepare(items):
                for item in items:
                    item.prepared = fit
                    if self.schedule.prepared(item, fit=fit):
                        assert fit
                        assert item.id not in self.removed
                    else:
                        self.left[item.id] += 1
                self.preparing -= len(items)
            case Forward(items):
                self.running -= 1
                self.left.update(item.id for item in items)

    @invariant()
    def each_request_leaves_once(self) -> None:
        if hasattr(self, "left"):
            assert max(self.left.values(), default=0) <= 1

    @invariant()
    def only_the_next_batches_are_prepared(self) -> None:
        if hasattr(self, "schedule"):
            assert self.preparing + self.schedule.ready <= self.schedule.batch_size * self.engines

    def teardown(self) -> None:
        """Every request leaves the schedule once if the threads continue to work."""
        if not hasattr(self, "schedule"):
            return
        self.now_s += 10
        while not isinstance(work := self.schedule.next(self.now_s, forwards=True, prepares=True), Wait):
            self._begin_and_end(work)
        for work in list(self.started):
            self._end(work, True)
        while not isinstance(work := self.schedule.next(self.now_s, forwards=True, prepares=True), Wait):
            self._begin_and_end(work)
        assert all(self.left[item.id] == 1 for item in self.items)

    def _begin_and_end(self, work: Work) -> None:
        match work:
            case Expired(items):
                self.left.update(item.id for item in items)
            case Prepare(items):
                self.preparing += len(items)
            case Forward():
                self.running += 1
        if not isinstance(work, Expired):
            self.started.append(work)
            self._end(work, True)


ScheduleMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestSchedule = ScheduleMachine.TestCase


def items(count: int, arrived_s: float = 0.0) -> list[Item]:
    return [Item(number, None, arrived_s) for number in range(count)]


def ids(work: Work) -> list[int]:
    assert isinstance(work, Prepare | Forward)
    return [item.id for item in work.items]


def end_preparation(schedule: Schedule, work: Work) -> None:
    assert isinstance(work, Prepare)
    for item in work.items:
        schedule.prepared(item, fit=True)


@pytest.mark.parametrize(
    ("arrived", "idle", "shares"), [(1, 2, [1]), (2, 2, [1, 1]), (5, 2, [3, 2]), (9, 2, [4, 4]), (9, 1, [4, 4])]
)
def test_idle_engines_share_the_arrived_requests(arrived: int, idle: int, shares: list[int]) -> None:
    schedule = Schedule(batch_size=4, engines=2)
    schedule.arrive(items(arrived))
    taken = [
        schedule.next(0, forwards=True, prepares=True, idle=max(idle - number, 1)) for number in range(len(shares))
    ]
    assert [len(ids(work)) for work in taken] == shares


def test_free_engine_takes_ready_requests_in_order_up_to_a_batch() -> None:
    schedule = Schedule(batch_size=4, engines=2)
    schedule.arrive(items(6))
    for _ in range(6):
        end_preparation(schedule, schedule.next(0, forwards=False, prepares=True))
    batches = [ids(schedule.next(0, forwards=True, prepares=False)) for _ in range(2)]
    assert batches == [[0, 1, 2, 3], [4, 5]]


def test_engine_waits_for_a_full_batch_at_most_for_the_delay() -> None:
    schedule = Schedule(batch_size=3, engines=1, delay_s=5)
    schedule.arrive(items(2, arrived_s=1))
    for _ in range(2):
        end_preparation(schedule, schedule.next(1, forwards=False, prepares=True))
    assert schedule.next(2, forwards=True, prepares=False) == Wait(6)
    # No more can come: there is nothing to wait for, but what is being prepared.
    assert isinstance(schedule.next(2, forwards=True, prepares=False, full=False), Wait)
    schedule.arrive([Item(7, None, 2)])
    assert schedule.next(2, forwards=True, prepares=False, full=True) == Wait(6)
    end_preparation(schedule, schedule.next(2, forwards=False, prepares=True))
    assert ids(schedule.next(2, forwards=True, prepares=False)) == [0, 1, 7]
    schedule.arrive(items(1, arrived_s=3))
    end_preparation(schedule, schedule.next(3, forwards=False, prepares=True))
    assert ids(schedule.next(8, forwards=True, prepares=False)) == [0]
    schedule.arrive(items(2, arrived_s=9))
    for _ in range(2):
        end_preparation(schedule, schedule.next(9, forwards=False, prepares=True))
    assert ids(schedule.next(9, forwards=True, prepares=False, full=True)) == [0, 1]


def test_request_removed_during_its_preparation_does_not_run() -> None:
    schedule = Schedule(batch_size=2, engines=1)
    schedule.arrive(items(1))
    work = schedule.next(0, forwards=False, prepares=True)
    assert isinstance(work, Prepare)
    assert not schedule.remove(work.items[0])
    assert not schedule.prepared(work.items[0], fit=True)
    assert schedule.next(0, forwards=True, prepares=True) == Wait()
