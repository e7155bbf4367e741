"""A field that is cut off the end of a message leaves the message and its bytes as they were."""

from __future__ import annotations

import pytest
from google.api import httpbody_pb2
from hypothesis import given
from hypothesis import strategies as st

from atserving import wire
from atserving.v1 import edge_pb2, evaluator_pb2, serving_pb2

EDGE = (3, 2)
SIZES = st.sampled_from([0, 1, 127, 128, 16383, 16384, 70_000])


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=20), SIZES, st.data())
def test_the_body_of_a_request_is_cut_off(
    app: str, version: str, content_type: str, size: int, data: st.DataObject
) -> None:
    body = httpbody_pb2.HttpBody(content_type=content_type, data=b"x" * size)
    message = edge_pb2.EdgeEvalRequest(app=app, version=version, body=body).SerializeToString()
    cut = wire.cut_tail(message, len(message), EDGE)
    if not size:
        # protobuf leaves an empty field out.
        assert cut is None
        return
    assert cut is not None
    small, offset = cut
    assert message[offset:] == b"x" * size
    body.data = b""
    assert edge_pb2.EdgeEvalRequest.FromString(small).body == body
    assert edge_pb2.EdgeEvalRequest.FromString(small).app == app
    # The start of the message is enough, if it reaches to the body.
    end = data.draw(st.integers(0, len(message)))
    assert wire.cut_tail(memoryview(message)[:end], len(message), EDGE) == (cut if end >= offset else None)


@given(SIZES)
def test_a_head_and_its_bytes_are_a_field(size: int) -> None:
    field = wire.field_head(evaluator_pb2.InferResponse.STREAM_FIELD_NUMBER, size) + b"x" * size
    assert evaluator_pb2.InferResponse.FromString(field).stream == b"x" * size


@pytest.mark.parametrize(
    "message",
    [
        serving_pb2.EvalRequest(data=[serving_pb2.Resource(body=b"x" * 99)], params_json="{}"),
        serving_pb2.EvalRequest(data=[serving_pb2.Resource(body=b"x" * 99)], group=True),
        serving_pb2.EvalRequest(data=[serving_pb2.Resource(body=b"x" * 99, attribute_json="1")]),
        serving_pb2.EvalRequest(data=[serving_pb2.Resource(uri="x" * 99)]),
        serving_pb2.EvalRequest(app="x" * 99),
        serving_pb2.EvalRequest(),
    ],
)
def test_a_message_that_ends_otherwise_is_left_alone(message: serving_pb2.EvalRequest) -> None:
    serialized = message.SerializeToString()
    assert wire.cut_tail(serialized, len(serialized), EDGE) is None


@pytest.mark.parametrize(("before", "found"), [(60, True), (1000, False)])
def test_a_field_behind_many_others_is_left_alone(before: int, found: bool) -> None:
    """Two bytes are a field, and a message may have millions of them."""
    body = serving_pb2.EvalRequest(data=[serving_pb2.Resource(body=b"x" * 99)]).SerializeToString()
    message = b"\x1a\x00" * before + body
    path = serving_pb2.EvalRequest.DATA_FIELD_NUMBER, serving_pb2.Resource.BODY_FIELD_NUMBER
    assert (wire.cut_tail(message, len(message), path) is not None) is found


@given(st.binary(max_size=60), st.integers(0, 100))
def test_rubbish_is_left_alone_or_cut_within_its_bounds(data: bytes, more: int) -> None:
    cut = wire.cut_tail(data, len(data) + more, EDGE)
    assert cut is None or 0 <= cut[1] <= len(data)


@given(SIZES, st.text(max_size=20), st.text(max_size=20), st.booleans(), st.booleans())
def test_the_source_of_the_first_resource_is_cut_out(
    size: int, attribute: str, params: str, is_uri: bool, more: bool
) -> None:
    resource = serving_pb2.Resource(attribute_json=attribute)
    if is_uri:
        resource.uri = "x" * size
    else:
        resource.body = b"x" * size
    others = [serving_pb2.Resource(uri="another")] if more else []
    request = evaluator_pb2.InferRequest(data=[resource, *others], params_json=params)
    message = request.SerializeToString()
    for number in (serving_pb2.Resource.URI_FIELD_NUMBER, serving_pb2.Resource.BODY_FIELD_NUMBER):
        cut = wire.cut_head(message, (evaluator_pb2.InferRequest.DATA_FIELD_NUMBER, number))
        if (number == serving_pb2.Resource.URI_FIELD_NUMBER) != is_uri:
            assert cut is None
            continue
        assert cut is not None
        small, start, end = cut
        assert message[start:end] == b"x" * size
        if is_uri:
            request.data[0].uri = ""
        else:
            request.data[0].body = b""
        assert evaluator_pb2.InferRequest.FromString(small) == request


@given(st.binary(max_size=60))
def test_rubbish_has_no_head_or_one_within_its_bounds(data: bytes) -> None:
    cut = wire.cut_head(data, (1, 1))
    assert cut is None or 0 <= cut[1] <= cut[2] <= len(data)
