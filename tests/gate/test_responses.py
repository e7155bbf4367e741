"""The gate passes large results on without parsing them, and no response is read wrongly."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atserving.errors import InvalidArgument, ServingError
from atserving.v1 import serving_pb2
from atserving.v1.evaluator_pb2 import Error, InferResponse
from atserving.wire import LARGE_BYTES
from gate import edge, responses
from gate.dispatch import EvalResult
from gate.responses import LargeResponse, Response
from gate.server import write_response

LARGE = "é" * LARGE_BYTES


def messages(response: Response) -> InferResponse:
    if isinstance(response, InferResponse):
        return response
    if response.is_stream:
        return InferResponse(stream=bytes(response.result), message=response.message)
    return InferResponse(result_json=bytes(response.result).decode(), message=response.message)


@given(
    st.sampled_from(["", "x", LARGE]),
    st.sampled_from(["result_json", "stream", "error", ""]),
    st.sampled_from(["", "a word", LARGE]),
    st.booleans(),
)
def test_response_is_the_same_however_it_is_read(text: str, outcome: str, message: str, in_buffer: bool) -> None:
    expected = InferResponse(message=message)
    match outcome:
        case "result_json":
            expected.result_json = text
        case "stream":
            expected.stream = text.encode()
        case "error":
            expected.error.message = text
    serialized = expected.SerializeToString()
    read = responses.read(memoryview(bytearray(serialized)) if in_buffer else serialized)
    assert messages(read) == expected
    assert (responses.error_of(read) is not None) == (outcome == "error")
    is_large = text == LARGE and outcome in ("result_json", "stream") and message != LARGE
    assert isinstance(read, LargeResponse) == is_large


def test_last_outcome_of_several_counts() -> None:
    first = InferResponse(result_json=LARGE).SerializeToString()
    second = InferResponse(error=Error(code=400, message="no")).SerializeToString()
    assert responses.error_of(responses.read(first + second))


@pytest.mark.parametrize("cut", [1, LARGE_BYTES, LARGE_BYTES * 2])
def test_cut_response_is_an_error(cut: int) -> None:
    serialized = InferResponse(result_json=LARGE).SerializeToString()[:-cut] + b"\xff" * (cut - 1)
    read = messages(responses.read(serialized))
    assert read.HasField("error") or len(read.result_json) == len(LARGE)


@pytest.mark.parametrize("message", ["", "a word"])
def test_large_result_is_written_like_a_small_one(message: str) -> None:
    document = json.dumps([LARGE])
    for outcome in (InferResponse(result_json=document, message=message), InferResponse(stream=LARGE.encode())):
        large = EvalResult(responses.read(outcome.SerializeToString()), "v1")
        assert isinstance(large.response, LargeResponse)
        small = EvalResult(outcome, "v1")
        assert edge.write_answer(large) == edge.write_answer(small)
        batch: list[EvalResult | ServingError] = [small, InvalidArgument("no"), large]
        items = json.loads(edge.write_batch(batch).body)
        assert items[0] == items[2]
        typed = [serving_pb2.EvalResponse.FromString(b"".join(write_response(each))) for each in batch]
        assert typed[0] == typed[2]
        assert typed[0].version == "v1"


def test_size_is_about_that_of_the_bytes() -> None:
    for text in ("x", LARGE):
        serialized = InferResponse(result_json=text).SerializeToString()
        assert len(serialized) - 10 < responses.size(responses.read(serialized)) <= len(serialized)
