"""The worker reads a request alike however large its resource is, and decodes data URIs within their limits."""

from __future__ import annotations

import base64
from typing import Any

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
