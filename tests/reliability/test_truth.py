"""An answer is right only if it names the digit, with the score of its version."""

from __future__ import annotations

from typing import Any

from reliability.truth import versions_that_say

TRUTH = {"digits": {"v1": [1.0, 0.9977], "v2": [1.0, 0.9999]}}


def result(index: int, score: float) -> dict[str, Any]:
    return {"confidences": [{"index": index, "class": "one", "score": score}]}


def test_the_score_tells_the_versions_apart() -> None:
    assert versions_that_say(TRUTH, "digits", 1, result(1, 0.9977)) == ["v1"]
    assert versions_that_say(TRUTH, "digits", 1, result(1, 0.9999)) == ["v2"]
    assert versions_that_say(TRUTH, "digits", 0, result(0, 1.0)) == ["v1", "v2"]


def test_another_digit_another_score_and_no_result_are_wrong() -> None:
    wrong_results: list[Any] = [result(0, 0.9977), result(1, 0.99), {}, {"confidences": []}, None]
    for wrong in wrong_results:
        assert not versions_that_say(TRUTH, "digits", 1, wrong)
