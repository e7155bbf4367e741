"""A call is late if it takes far longer than the usual answers of its instance."""

from __future__ import annotations

import pytest

from gate.pace import LEAST_LATE_S, Pace


def test_nothing_is_late_before_half_a_second() -> None:
    pace = Pace()
    assert pace.late_s == LEAST_LATE_S == 0.5
    for _ in range(100):
        pace.learn(0.01)
    assert pace.late_s == 0.5


def test_a_slow_net_has_five_times_its_usual_time() -> None:
    pace = Pace()
    for _ in range(50):
        pace.learn(1.0)
    assert pace.late_s == pytest.approx(5.0, rel=0.01)


def test_the_usual_time_is_a_high_one() -> None:
    pace = Pace()
    for number in range(1000):
        pace.learn(1.0 if number % 10 == 0 else 0.1)
    # Far above the mean of 0.19 s.
    assert pace.late_s > 5 * 0.6


def test_one_answer_after_a_standstill_does_not_make_a_gate_patient() -> None:
    pace = Pace()
    for _ in range(50):
        pace.learn(0.1)
    pace.learn(2.0)
    for _ in range(100):
        pace.learn(0.1)
    assert pace.late_s < 5 * 0.25


def test_hedges_are_one_for_ten_answers_and_a_few() -> None:
    pace = Pace()
    assert [pace.take() for _ in range(6)] == [True] * 4 + [False] * 2
    for _ in range(21):
        pace.learn(0.1)
    assert [pace.take() for _ in range(4)] == [True] * 2 + [False] * 2
    for _ in range(10_000):
        pace.learn(0.1)
    taken = 0
    while pace.take():
        taken += 1
    assert taken == 32
    pace.give_back()
    assert pace.take()
