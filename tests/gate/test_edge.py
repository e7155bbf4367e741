"""The edge module reads and refuses the HTTP API's request bodies, and writes its response bodies."""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atserving.errors import (
    InvalidArgument,
    NetError,
    PayloadTooLarge,
    ResourceExhausted,
    ServingError,
    UnsupportedMediaType,
)
from atserving.v1 import evaluator_pb2
from gate import edge
from gate.dispatch import EvalResult, Task

URI = {"uri": "http://host/a.png"}


def read(fields: Any) -> Task:
    return edge.read_eval("app", "v1", edge.JSON, json.dumps(fields).encode())


def result(**outcome: Any) -> EvalResult:
    return EvalResult(evaluator_pb2.InferResponse(**outcome), "v1")


def test_object_becomes_one_resource_and_list_a_group() -> None:
    assert [(each.uri, each.attribute_json) for each in read({"data": URI}).request.data] == [("http://host/a.png", "")]
    assert not read({"data": URI}).request.group
    group = read({"data": [URI, {**URI, "attribute": [1, "x"]}]}).request
    assert group.group
    assert group.data[1].attribute_json == '[1, "x"]'
    assert read({"data": [URI]}).request.group


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(json_values)
def test_params_and_attributes_arrive_unchanged(value: Any) -> None:
    request = read({"data": {**URI, "attribute": value}, "params": value}).request
    for arrived in (request.params_json, request.data[0].attribute_json):
        again = json.loads(arrived) if arrived else None
        assert again == value
        assert type(again) is type(value)


def test_body_of_bytes_becomes_one_resource() -> None:
    request = edge.read_eval("app", "", "application/octet-stream; x=y", b"\x00\xff").request
    assert [each.body for each in request.data] == [b"\x00\xff"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "Expected `object`, got `array`"),
        ({}, "missing required field `data`"),
        ({"data": []}, "data is an empty list"),
        ({"data": None}, r"got `null` - at `\$.data`"),
        ({"data": "http://host"}, r"got `str` - at `\$.data`"),
        ({"data": {}}, r"missing required field `uri` - at `\$.data`"),
        ({"data": [URI, {"uri": 1}]}, r"got `int` - at `\$.data\[1\].uri`"),
    ],
)
def test_malformed_request_gets_an_error_that_names_the_mistake(fields: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        read(fields)


@given(st.binary())
def test_random_bytes_raise_only_errors_of_the_caller(body: bytes) -> None:
    for content_type in (edge.JSON, edge.BYTES, "text/html", ""):
        with suppress(InvalidArgument, UnsupportedMediaType):
            edge.read_eval("app", "", content_type, body)
        with suppress(InvalidArgument, UnsupportedMediaType, PayloadTooLarge):
            edge.read_batch(content_type, body, 10)


def test_nested_params_arrive_unchanged_and_too_deep_ones_are_refused() -> None:
    nested = b"[" * 500 + b"]" * 500
    body = b'{"op": "/v1/eval/a", "data": {"uri": "x"}, "params": %s}'
    assert edge.read_eval("app", "", edge.JSON, body % nested).request.params_json == nested.decode()
    too_deep = b"[" * 100_000 + b"]" * 100_000
    for deep in (b"[" * 1_000_000, body % too_deep):
        with pytest.raises(InvalidArgument, match="malformed"):
            edge.read_eval("app", "", edge.JSON, deep)
    first, second = edge.read_batch(edge.JSON, b"[%s,%s]" % (body % nested, body % b"{}"), 2)
    assert isinstance(first, Task)
    assert isinstance(second, Task)


def test_batch_over_its_limit_is_refused_before_its_tasks_are_read() -> None:
    with pytest.raises(PayloadTooLarge, match="the batch has more than 10 tasks"):
        edge.read_batch(edge.JSON, b"[" + b"1," * 10 + b"1]", 10)


def test_json_that_is_not_utf_8_is_refused() -> None:
    for params in (b'"\xff"', b'{"\xff":1}'):
        with pytest.raises(InvalidArgument, match="malformed JSON"):
            edge.read_eval("app", "", edge.JSON, b'{"data": {"uri": "x"}, "params": %s}' % params)


@pytest.mark.parametrize("op", [None, 1, "", "/v1/eval", "/v1/eval/", "/v1/eval/a/", "/v1/eval/a/b/c", "v1/eval/a"])
def test_bad_op_fails_only_its_own_task(op: Any) -> None:
    first, second = edge.read_batch(
        edge.JSON, orjson.dumps([{"op": op, "data": URI}, {"op": "/v1/eval/a/b", "data": URI}]), 2
    )
    assert isinstance(first, InvalidArgument)
    assert "op" in first.message
    assert isinstance(second, Task)
    assert (second.app, second.version) == ("a", "b")


@pytest.mark.parametrize("body", [b"{}", b"[]", b"1", b"", b"[1,"])
def test_malformed_batch_is_refused_as_a_whole(body: bytes) -> None:
    with pytest.raises(InvalidArgument):
        edge.read_batch(edge.JSON, body, 10)


def test_result_is_written_as_json_and_stream_as_bytes() -> None:
    reply = edge.write_answer(result(result_json='{"n":1}', message='a "b"'))
    assert reply.body == b'{"code":0,"message":"a \\"b\\"","result":{"n":1}}'
    assert (reply.status, reply.content_type, reply.headers) == (200, edge.JSON, {"x-serving-version": "v1"})
    reply = edge.write_answer(result(stream=b"\x00\x01"))
    assert (reply.status, reply.content_type, reply.body) == (200, edge.BYTES, b"\x00\x01")


def test_error_response_has_an_http_status_and_the_nets_own_code() -> None:
    reply = edge.write_error(NetError(-3, "bad image"))
    assert (reply.status, orjson.loads(reply.body)) == (400, {"code": -3, "message": "bad image"})
    reply = edge.write_error(ResourceExhausted("full", retry_after_s=0.2))
    assert (reply.status, reply.headers) == (429, {"retry-after": "1"})


@pytest.mark.parametrize(
    ("code", "status"), [(-1, 400), (-2, 500), (-3, 400), (422, 422), (512, 512), (599, 599), (7, 500), (302, 500)]
)
def test_nets_error_code_maps_to_an_http_status(code: int, status: int) -> None:
    error = ServingError.from_proto(NetError(code, "").to_proto())
    assert (error.code, error.status) == (code, status)


def test_batch_response_is_an_array_with_streams_as_data_uris() -> None:
    results: list[EvalResult | ServingError] = [
        result(result_json="[]"),
        InvalidArgument("no"),
        result(stream=b"\xff" * 100),
    ]
    items = orjson.loads(edge.write_batch(results).body)
    assert items[0] == {"code": 0, "message": "", "result": []}
    assert items[1] == {"code": 400, "message": "no"}
    header, _, data = items[2]["stream"].partition(",")
    assert header == "data:application/octet-stream;base64"
    assert base64.b64decode(data) == b"\xff" * 100
