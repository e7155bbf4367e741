"""The judge of a worker's death finds the guilty calls, and retries all others that may be guilty alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluator.serving import blame
from evaluator.serving.blame import Judgement

NOW_S = 100.0


@dataclass(eq=False)
class Call:
    """A call in flight with a name for messages; each differs from all others."""

    name: str
    late_s: float = NOW_S + 1

    def __repr__(self) -> str:
        return self.name


def names(judgement: Judgement[Call]) -> tuple[str, str, str]:
    """Return the names of the late, the guilty and the suspects; each call has a name of one letter."""
    late, guilty, suspects = (
        "".join(call.name for call in calls) for calls in (judgement.late, judgement.guilty, judgement.suspects)
    )
    return late, guilty, suspects


@pytest.mark.parametrize(
    ("at_work", "suspects", "killed", "guilty", "suspects_after"),
    [
        pytest.param("", "", False, "", "", id="idle process crashes: no call is a suspect"),
        pytest.param("", "ab", False, "", "ab", id="idle process crashes: earlier suspects remain"),
        pytest.param("a", "", False, "a", "", id="single call crashes: it is guilty"),
        pytest.param("a", "abc", False, "a", "bc", id="suspect crashes alone: it is guilty, the others remain"),
        pytest.param("ab", "", False, "", "ab", id="two calls crash: both are suspects"),
        pytest.param("cb", "abd", False, "", "abdc", id="new suspects follow earlier ones"),
        pytest.param("a", "", True, "", "a", id="single call under SIGKILL: it is a suspect"),
        pytest.param("a", "ab", True, "a", "b", id="suspect under SIGKILL: it is guilty"),
        pytest.param("ab", "a", True, "", "ab", id="two calls under SIGKILL: both are suspects"),
    ],
)
def test_judge_blames_a_call_only_if_it_ran_alone(
    at_work: str, suspects: str, killed: bool, guilty: str, suspects_after: str
) -> None:
    calls = {name: Call(name) for name in "abcd"}
    judgement = blame.judge(
        [calls[name] for name in at_work],
        [calls[name] for name in suspects],
        stuck=False,
        killed=killed,
        now_s=NOW_S,
    )
    assert names(judgement) == ("", guilty, suspects_after)


@pytest.mark.parametrize(
    ("deadlines_s", "late", "suspects"),
    [
        pytest.param({"a": NOW_S - 1}, "a", "", id="single call past its deadline is late"),
        pytest.param({"a": NOW_S + 1}, "a", "", id="single call is late even before its deadline"),
        pytest.param({"a": NOW_S, "b": NOW_S + 1}, "a", "b", id="call is late at its deadline, the other is a suspect"),
        pytest.param({"a": NOW_S - 1, "b": NOW_S - 2}, "ab", "", id="all calls past their deadlines are late"),
        pytest.param({"a": NOW_S + 1, "b": NOW_S + 2}, "", "ab", id="batch before its deadlines has suspects only"),
    ],
)
def test_judge_finds_the_late_calls_of_a_stuck_process(deadlines_s: dict[str, float], late: str, suspects: str) -> None:
    calls = [Call(name, late_s) for name, late_s in deadlines_s.items()]
    # The supervisor kills a stuck process with SIGKILL.
    judgement = blame.judge(calls, [], stuck=True, killed=True, now_s=NOW_S)
    assert names(judgement) == (late, "", suspects)


def test_deadline_does_not_matter_unless_the_process_is_stuck() -> None:
    calls = [Call("a", NOW_S - 1), Call("b", NOW_S - 1)]
    assert names(blame.judge(calls, [], stuck=False, killed=False, now_s=NOW_S)) == ("", "", "ab")


@given(
    at_work=st.lists(st.integers(0, 7), unique=True),
    suspects=st.lists(st.integers(0, 7), unique=True),
    past=st.sets(st.integers(0, 7)),
    stuck=st.booleans(),
    killed=st.booleans(),
)
def test_verdict_covers_each_call_and_blames_no_call_that_was_not_at_work(
    at_work: list[int], suspects: list[int], past: set[int], stuck: bool, killed: bool
) -> None:
    calls = [Call(str(number), NOW_S - 1 if number in past else NOW_S + 1) for number in range(8)]
    ran, earlier = [calls[number] for number in at_work], [calls[number] for number in suspects]
    judgement = blame.judge(ran, earlier, stuck=stuck, killed=killed or stuck, now_s=NOW_S)
    late, guilty, suspected = set(judgement.late), set(judgement.guilty), set(judgement.suspects)
    assert late | guilty | suspected == set(ran) | set(earlier)
    assert late | guilty <= set(ran)
    assert not guilty & (late | suspected)
    assert len(judgement.suspects) == len(suspected), "each suspect runs again once"
    # Earlier suspects run first, in their order.
    remaining = [call for call in earlier if call not in late | guilty]
    assert [call for call in judgement.suspects if call in earlier and call not in late] == remaining
    new = [call for call in judgement.suspects if call not in earlier]
    assert judgement.suspects[len(judgement.suspects) - len(new) :] == new


@given(count=st.integers(1, 8), culprit=st.integers(0, 7), killed=st.booleans())
def test_retries_alone_find_the_one_call_that_crashes(count: int, culprit: int, killed: bool) -> None:
    """Follow the verdicts as the supervisor does: suspects run alone, in order, until one crashes the process."""
    calls = [Call(str(number)) for number in range(count)]
    guilty = calls[culprit % count]
    judgement = blame.judge(calls, [], stuck=False, killed=killed, now_s=NOW_S)
    if not judgement.guilty:
        suspects = list(judgement.suspects)
        suspects = suspects[suspects.index(guilty) :]
        judgement = blame.judge([guilty], suspects, stuck=False, killed=killed, now_s=NOW_S)
        assert judgement.suspects == suspects[1:]
    assert judgement.guilty == [guilty]
    assert not judgement.late
