"""A call in the worker counts as stuck once it has run far longer than any call before, with its deadline passed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluator.serving.patience import LEAST_S, MOST_S, Patience, Standstill
from evaluator.worker.progress import Running

NOW_S = 1000.0
PASSED = [NOW_S - 0.1]


def running(took_s: float, *, preparing: bool = False) -> Running:
    """Return a call that runs for ``took_s`` seconds at NOW_S."""
    return Running((1,), NOW_S - took_s, preparing)


def assert_patience(patience: Patience, limit_s: float, *, preparing: bool = False) -> None:
    """Assert that a call with its deadline passed may run for ``limit_s`` seconds, and no longer."""
    assert not patience.is_over(running(limit_s - 0.01, preparing=preparing), PASSED, NOW_S)
    assert patience.is_over(running(limit_s + 0.01, preparing=preparing), PASSED, NOW_S)


@pytest.mark.parametrize(
    ("longest_s", "limit_s"),
    [
        pytest.param(0.0, 1.0, id="no call finished yet: the least patience"),
        pytest.param(0.05, 1.0, id="short calls: the least patience"),
        pytest.param(0.5, 5.0, id="ten times the longest call"),
        pytest.param(2.0, 20.0, id="ten times the longest call, still under the most"),
        pytest.param(3.0, 23.0, id="long calls: 20 s more than the longest"),
        pytest.param(60.0, 80.0, id="very long calls: 20 s more than the longest"),
    ],
)
def test_patience_follows_the_longest_call(longest_s: float, limit_s: float) -> None:
    assert (LEAST_S, MOST_S) == (1.0, 20.0)
    patience = Patience(math.inf)
    patience.learn_prepare(0)
    patience.learn_infer(longest_s)
    assert_patience(patience, limit_s)


def test_a_long_call_is_forgotten_after_many_shorter_ones() -> None:
    patience = Patience(math.inf)
    patience.learn_prepare(6.4)
    patience.learn_infer(6.4)
    for preparing in (True, False):
        assert_patience(patience, 26.4, preparing=preparing)
    # A few shorter calls change little.
    patience.learn_prepare(0.2)
    patience.learn_infer(0.2)
    assert not patience.is_over(running(26.2), PASSED, NOW_S)
    for _ in range(400):
        patience.learn_prepare(0.2)
        patience.learn_infer(0.2)
    assert not patience.is_over(running(2.0), PASSED, NOW_S)
    assert patience.is_over(running(2.3), PASSED, NOW_S)


@pytest.mark.parametrize(
    ("preparing", "limit_s"), [pytest.param(True, 3.0, id="prepare"), pytest.param(False, 6.0, id="infer")]
)
def test_preparation_and_inference_have_their_own_patience(preparing: bool, limit_s: float) -> None:
    patience = Patience(math.inf)
    patience.learn_prepare(0.3)
    patience.learn_infer(0.6)
    assert_patience(patience, limit_s, preparing=preparing)


@pytest.mark.parametrize(
    ("deadlines_s", "stuck"),
    [
        pytest.param([NOW_S + 1], False, id="before the deadline"),
        pytest.param([NOW_S], True, id="at the deadline"),
        pytest.param([NOW_S + 1, NOW_S - 1, NOW_S + 2], True, id="after one deadline of a batch"),
        pytest.param([], False, id="no call is known any more"),
    ],
)
def test_call_is_not_stuck_before_a_deadline_has_passed(deadlines_s: list[float], stuck: bool) -> None:
    assert Patience(math.inf).is_over(running(500), deadlines_s, NOW_S) is stuck


@pytest.mark.parametrize("longest_s", [0.0, 60.0])
def test_call_past_the_script_timeout_is_stuck_in_any_case(longest_s: float) -> None:
    patience = Patience(0.3)
    patience.learn_prepare(longest_s)
    patience.learn_infer(longest_s)
    assert not patience.is_over(running(0.29), [math.inf], NOW_S)
    assert patience.is_over(running(0.31), [math.inf], NOW_S)


durations_s = st.floats(0, 1000, allow_nan=False)


@given(longest_s=durations_s, took_s=durations_s, deadline_s=st.floats(0, 2 * NOW_S))
def test_working_script_is_never_stuck(longest_s: float, took_s: float, deadline_s: float) -> None:
    """A call that takes no longer than an earlier one must not end the process, even after its deadline."""
    patience = Patience(math.inf)
    patience.learn_prepare(longest_s)
    patience.learn_infer(longest_s)
    is_over = patience.is_over(running(took_s), [deadline_s], NOW_S)
    if took_s <= longest_s or took_s <= LEAST_S - 0.01 or deadline_s > NOW_S:
        assert not is_over
    elif took_s > longest_s + MOST_S + 0.01:
        assert is_over


@pytest.mark.parametrize(
    ("prepare_s", "infer_s", "limit_s"),
    [
        pytest.param(0.001, 0.01, 1.0, id="short batches: the least"),
        pytest.param(0.0, 0.5, 2.0, id="four times the longest batch"),
        pytest.param(0.1, 0.2, 4.0, id="a batch of eight is prepared first"),
    ],
)
def test_a_worker_stands_still_after_four_times_the_longest_batch(
    prepare_s: float, infer_s: float, limit_s: float
) -> None:
    patience = Patience(math.inf)
    patience.learn_prepare(prepare_s)
    patience.learn_infer(infer_s)
    assert patience.still_s(8) == pytest.approx(limit_s)


def test_a_standstill_counts_only_while_nothing_moves() -> None:
    standstill = Standstill(0.2)
    assert standstill.look("a", 10.0) == 0
    assert standstill.look("a", 10.1) == pytest.approx(0.1)
    assert standstill.look("a", 10.3) == pytest.approx(0.3)
    assert standstill.look("b", 10.4) == 0
    assert standstill.look("b", 10.5) == pytest.approx(0.1)
    for now_s in (10.6, 10.7):
        assert standstill.look(None, now_s) == 0


def test_a_front_that_stood_still_itself_blames_no_worker() -> None:
    standstill = Standstill(0.2)
    standstill.look("a", 10.0)
    assert standstill.look("a", 50.0) == pytest.approx(0.2)
