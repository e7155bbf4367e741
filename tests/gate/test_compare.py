"""Two answers are the same if they say the same, with a tolerance on scores and boxes."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from atserving.config import Shadow
from atserving.v1.evaluator_pb2 import InferResponse
from gate import compare
from gate.responses import LargeResponse

SHADOW = Shadow(version="v2", percent=1)
BOX = [[1, 2], [30, 2], [30, 40], [1, 40]]


def moved(by: float) -> list[list[float]]:
    return [[x + by, y] for x, y in BOX]


def detections(*scores: float, pts: Any = BOX, index: int = 3) -> dict[str, Any]:
    return {"detections": [{"pts": pts, "index": index, "class": "cat", "score": each} for each in scores]}


@pytest.mark.parametrize(
    ("ours", "other", "difference"),
    [
        (detections(0.9), detections(0.905), ""),
        (detections(0.9), detections(0.92), "detections[0].score: 0.9 and 0.92"),
        (detections(0.9), detections(0.9, 0.5), "detections: 1 and 2 items"),
        (detections(0.9), detections(0.9, pts=moved(1.5)), ""),
        (detections(0.9), detections(0.9, pts=moved(3)), "detections[0].pts[0][0]: 1 and 4"),
        (detections(0.9), detections(0.9, index=4), "detections[0].index: 3 and 4"),
        ({"a": 1, "b": [None, True]}, {"b": [None, True], "a": 1}, ""),
        ({"a": 1}, {"a": 1.0}, ""),
        ({"a": 1}, {"a": True}, "a: 1 and true"),
        ({"a": 1}, {"a": None}, "a: 1 and null"),
        ({"a": 1}, {}, ": only one has 'a'"),
        ({"a": {"b": "x" * 99}}, {"a": {"b": "y"}}, f'a.b: "{"x" * 39}... and "y"'),
        ({"sum": 1.0}, {"sum": 1.0000001}, ""),
        ({"sum": 1.0}, {"sum": 1.001}, "sum: 1 and 1.001"),
        (2**53 + 1, 2**53, f": {2**53 + 1} and {2**53}"),
        ("text", "text", ""),
    ],
)
def test_json(ours: Any, other: Any, difference: str) -> None:
    both = [InferResponse(result_json=orjson.dumps(each).decode()) for each in (ours, other)]
    assert compare.difference(both[0], both[1], SHADOW) == difference
    large = LargeResponse(orjson.dumps(ours), False, "")
    assert compare.difference(large, both[1], SHADOW) == difference


def test_tolerances_are_the_shadows() -> None:
    half, more, near = (LargeResponse(orjson.dumps(detections(each)), False, "") for each in (0.5, 0.6, 0.50001))
    assert compare.difference(half, more, Shadow(version="v", percent=1, score_tolerance=0.2)) == ""
    exact = Shadow(version="v", percent=1, score_tolerance=0)
    assert compare.difference(half, near, exact) == "detections[0].score: 0.5 and 0.50001"


@pytest.mark.parametrize(
    ("ours", "other", "difference"),
    [
        (InferResponse(stream=b"12"), InferResponse(stream=b"12"), ""),
        (InferResponse(stream=b"12"), InferResponse(stream=b"13"), "other bytes"),
        (InferResponse(stream=b"12"), LargeResponse(b"123", True, ""), "2 and 3 bytes"),
        (InferResponse(stream=b"12"), InferResponse(result_json="12"), "one is a stream"),
        (InferResponse(result_json="{}"), InferResponse(result_json="{"), "no JSON"),
    ],
)
def test_streams_and_others(ours: Any, other: Any, difference: str) -> None:
    assert compare.difference(ours, other, SHADOW) == difference


def test_deep_documents_are_compared_by_their_bytes() -> None:
    deep, other = (LargeResponse(b"[" * 1000 + inner + b"]" * 1000, False, "") for inner in (b"1", b"2"))
    assert compare.difference(deep, deep, SHADOW) == ""
    assert compare.difference(deep, other, SHADOW) == "other text, nested too deeply to compare as JSON"


def test_long_documents_are_compared_by_their_bytes() -> None:
    text = orjson.dumps(["x" * compare.MAX_JSON_BYTES])
    assert compare.difference(LargeResponse(text, False, ""), LargeResponse(text, False, ""), SHADOW) == ""
    spaced = LargeResponse(b" " + text, False, "")
    difference = compare.difference(LargeResponse(text, False, ""), spaced, SHADOW)
    assert difference == "other text, too long to compare as JSON"
