"""The worker reads a request alike however large its resource is, and decodes data URIs within their limits."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import orjson
import pytest

from atserving.errors import InvalidArgument
from atserving.v1.evaluator_pb2 import InferRequest
from atserving.v1.serving_pb2 import Resource
from evaluator.limits import Limits
from evaluator.worker import request_codec

LARGE = bytes(range(256)) * 1000


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def read(request: InferRequest, limits: Limits | None = None) -> dict[str, Any]:
    return dict(request_codec.read(request.SerializeToString(), limits or Limits(), None))


@pytest.mark.parametrize("data", [b"small", LARGE])
@pytest.mark.parametrize("first_is_uri", [False, True])
@pytest.mark.parametrize("second_is_uri", [False, True])
def test_bodies_and_data_uris_are_read_alike(data: bytes, first_is_uri: bool, second_is_uri: bool) -> None:
    def resource(is_uri: bool) -> Resource:
        return Resource(uri=data_uri(data)) if is_uri else Resource(body=data)

    first, second = resource(first_is_uri), resource(second_is_uri)
    first.attribute_json = '{"a":1}'
    expected = {"uri": "", "body": data, "attribute": {"a": 1}}
    assert read(InferRequest(data=[first], params_json="[1]")) == {"data": expected, "params": [1]}
    group = read(InferRequest(data=[first, second], group=True))
    assert group == {"data": [expected, {"uri": "", "body": data}]}


@pytest.mark.parametrize("is_uri", [False, True])
def test_each_resource_and_data_uris_together_are_bounded(is_uri: bool) -> None:
    resource = Resource(uri=data_uri(LARGE)) if is_uri else Resource(body=LARGE)
    with pytest.raises(InvalidArgument, match="the resource is larger than 1000 bytes"):
        read(InferRequest(data=[resource]), Limits(max_bytes=1000))
    group = InferRequest(data=[resource] * 2, group=True)
    limits = Limits(max_request_bytes=len(LARGE) * 2 - 1)
    if is_uri:
        with pytest.raises(InvalidArgument, match="resources are larger than 511999 bytes together"):
            read(group, limits)
    else:
        # The gate's limit of a request bounds them.
        assert len(read(group, limits)["data"]) == 2


@pytest.mark.parametrize("uri", ["http://host/a", "", "data:,x", "data:;base64,*", data_uri(LARGE) + "*"])
def test_other_uris_are_refused(uri: str) -> None:
    with pytest.raises(InvalidArgument):
        read(InferRequest(data=[Resource(uri=uri)]))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("1e999", "has a number beyond 1.8e+308"),
        ('{"x": [-1e400]}', "has a number beyond 1.8e+308"),
        ("1.7976931348623159e308", "has a number beyond 1.8e+308"),
        ("1" * 310 + ".5", "has a number beyond 1.8e+308"),
        ("[" * 129 + "]" * 129, "is nested more than 128 levels deep"),
        ('{"a":' * 129 + "1" + "}" * 129, "is nested more than 128 levels deep"),
        ("[" * 100_000, "is nested more than 128 levels deep"),
        ('"\\ud800"', "has half of a surrogate pair"),
        ('{"\\uDFFF": 1}', "has half of a surrogate pair"),
        ("-Infinity", "is not JSON"),
    ],
)
def test_json_that_no_answer_can_repeat_is_refused(text: str, wrong: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(f"params {wrong}")):
        read(InferRequest(data=[Resource(body=b"x")], params_json=text))
    with pytest.raises(InvalidArgument, match=re.escape(f"attribute {wrong}")):
        read(InferRequest(data=[Resource(body=b"x", attribute_json=text)]))


@pytest.mark.parametrize(
    "text",
    [
        "[1.7976931348623157e308,-1.7976931348623157e308,0.0,1]",
        "[" * 128 + "1" + "]" * 128,
        "[" + ",".join(["{}"] * 1000) + "]",
        '"' + "[" * 1000 + '"',
        '["\\ud83d\\ude00","\\\\ud800"]',
    ],
)
def test_other_json_is_read_and_can_be_repeated(text: str) -> None:
    params = read(InferRequest(data=[Resource(body=b"x")], params_json=text))["params"]
    assert params == json.loads(text)
    assert json.loads(orjson.dumps({"echo": params})) == {"echo": params}
