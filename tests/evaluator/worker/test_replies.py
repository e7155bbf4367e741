"""The worker writes replies by hand, as protobuf would."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atserving import frames, link
from atserving.errors import InvalidArgument
from atserving.v1.evaluator_pb2 import InferResponse
from evaluator.worker.batcher import ItemResult
from evaluator.worker.main import _reply
from evaluator.worker.net_runner import Result
from evaluator.worker.schedule import Item

MESSAGES = st.one_of(st.just(""), st.text())


def sent(result: ItemResult) -> link.Reply:
    taken: list[link.Reply] = []
    reader = frames.FrameReader(lambda kind, data, start, end: taken.append(link.read_reply(data, start, end)))
    reader.feed(b"".join(_reply(result, leads=True)))
    (reply,) = taken
    return reply


@given(MESSAGES, st.one_of(st.text(max_size=300), st.integers(100, 40_000).map("x".__mul__)))
def test_result_is_the_message_that_protobuf_writes(message: str, value: str) -> None:
    text = orjson.dumps(value)
    for result, expected in (
        (Result(message, json=text), InferResponse(message=message, result_json=text.decode())),
        (Result(message, stream=text), InferResponse(message=message, stream=text)),
        (Result(message, stream=b""), InferResponse(message=message, stream=b"")),
        (Result(message), InferResponse(message=message, result_json="null")),
    ):
        reply = sent(ItemResult(Item(7, None, 0.0), result, batch_size=2))
        assert InferResponse.FromString(bytes(reply.response)) == expected
        assert (reply.id, reply.outcome, reply.batch_size, reply.leads) == (7, link.RESULT, 2, 1)


def test_error_is_marked_as_one() -> None:
    reply = sent(ItemResult(Item(7, None, 0.0), InvalidArgument("bad")))
    assert reply.outcome == link.ERROR
    assert InferResponse.FromString(bytes(reply.response)).error.message == "bad"


@pytest.mark.parametrize(("seconds", "microseconds"), [(-1.0, 0), (0.0, 0), (0.0015, 1500), (1e9, 2**32 - 1)])
def test_stages_are_bounded(seconds: float, microseconds: int) -> None:
    item = Item(7, None, 0.0, prepare_s=seconds)
    reply = sent(ItemResult(item, Result("", stream=b""), seconds, seconds, seconds))
    assert reply[2:6] == (microseconds,) * 4
