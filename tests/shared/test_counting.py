"""The checks refuse a message with more elements than it may have before an object is made of each."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atserving.counting import MAX_GROUP, TooMany, check_data, check_objects, check_repeated
from atserving.v1 import serving_pb2
from atserving.wire import field_spans

DATA = serving_pb2.EvalRequest.DATA_FIELD_NUMBER
TASKS = serving_pb2.BatchRequest.TASKS_FIELD_NUMBER
GROUP = b"\xfb\x01\xfc\x01"
"""An empty group, as an unknown field."""
EMPTY = bytes([DATA << 3 | 2, 0])
MILLION = 1_000_000


def peak(work: Callable[[], object]) -> int:
    """Return how many bytes a call took at most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(check: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    def work() -> None:
        with pytest.raises(TooMany):
            check(*arguments)

    return work


def task(resources: int) -> bytes:
    inner = EMPTY * resources
    return serving_pb2.BatchRequest(tasks=[serving_pb2.EvalRequest.FromString(inner)]).SerializeToString()


OBJECT = b'{"uri":"data:"}'
HOSTILE = {
    "resources": refused(check_repeated, EMPTY * MILLION, MAX_GROUP, DATA),
    "unknown fields": refused(check_repeated, b"\x78\x00" * MILLION, MAX_GROUP, DATA),
    "resources behind a group": refused(check_repeated, GROUP + EMPTY * MILLION, MAX_GROUP, DATA),
    "tasks": refused(check_repeated, EMPTY.replace(b"\x1a", b"\x0a") * MILLION, 1000, TASKS, (64_000, DATA)),
    "resources of tasks": refused(check_repeated, task(100_000), 1000, TASKS, (64_000, DATA)),
    "JSON objects": refused(check_objects, b"[" + b",".join([OBJECT] * MILLION) + b"]", 1000),
    "JSON resources": refused(check_data, b'{"data":[' + b",".join([OBJECT] * MILLION) + b"]}", MAX_GROUP),
}


@pytest.mark.parametrize("work", HOSTILE.values(), ids=list(HOSTILE))
def test_millions_of_elements_are_refused_without_an_object_for_each(work: Callable[[], None]) -> None:
    assert peak(work) < 32 << 20


@pytest.mark.parametrize("document", [b"[" + b"1," * MILLION + b"1]", b"[" + b"[]," * MILLION + b"[]]"])
def test_elements_that_are_no_objects_are_refused_at_the_first(document: bytes) -> None:
    def work() -> None:
        with pytest.raises(msgspec.ValidationError):
            check_objects(document, 1000)

    assert peak(work) < 32 << 20


def test_as_many_as_allowed_pass_whatever_else_they_hold() -> None:
    commas = list(range(10_000))
    check_data(json.dumps({"data": [{"uri": "x", "attribute": commas}] * MAX_GROUP}).encode(), MAX_GROUP)
    check_data(json.dumps({"data": {"uri": "x", "attribute": commas}, "params": commas}).encode(), MAX_GROUP)
    check_objects(json.dumps([{"op": "/v1/eval/a", "params": commas}] * 10).encode(), 10)
    resources = [serving_pb2.Resource(body=b"x" * 1000)] * MAX_GROUP
    one = serving_pb2.EvalRequest(app="a", version="v", data=resources, group=True, params_json="1")
    check_repeated(one.SerializeToString(), MAX_GROUP, DATA)
    batch = serving_pb2.BatchRequest(tasks=[one] * 10).SerializeToString()
    check_repeated(batch, 10, TASKS, (640, DATA))
    refused(check_repeated, batch, 9, TASKS, (640, DATA))()
    refused(check_repeated, batch, 10, TASKS, (639, DATA))()


def test_one_more_than_allowed_is_refused() -> None:
    commas = list(range(10_000))
    resources = [{"uri": "x", "attribute": commas}] * (MAX_GROUP + 1)
    refused(check_data, json.dumps({"data": resources}).encode(), MAX_GROUP)()
    refused(check_objects, json.dumps([{"params": commas}] * 11).encode(), 10)()


@given(st.binary(max_size=64), st.integers(0, 5))
def test_malformed_messages_have_the_fields_up_to_there(data: bytes, number: int) -> None:
    spans = field_spans(data, number, 100)
    if spans is None:
        # It begins a group, or has a wire type that there is not.
        return
    assert all(0 <= start <= end <= len(data) for start, end in spans)


@given(st.lists(st.binary(max_size=300), max_size=20), st.text(max_size=5))
def test_spans_are_those_of_the_fields(bodies: list[bytes], app: str) -> None:
    request = serving_pb2.EvalRequest(app=app, data=[serving_pb2.Resource(body=each) for each in bodies], group=True)
    serialized = request.SerializeToString()
    spans = field_spans(serialized, DATA, 100)
    assert spans is not None
    assert [serving_pb2.Resource.FromString(serialized[start:end]).body for start, end in spans] == bodies
