"""Large resources reach instances as they arrived, whatever else a request has."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atserving.errors import InvalidArgument
from atserving.v1.evaluator_pb2 import InferRequest
from atserving.v1.serving_pb2 import Resource
from atserving.wire import LARGE_BYTES
from gate import bodies, edge
from gate.bodies import Body
from gate.dispatch import Task

LARGE_URI = "data:image/png;base64," + "QUJD" * LARGE_BYTES


def read(document: Any, **options: Any) -> Task:
    text = json.dumps(document, **options) if not isinstance(document, bytes) else document.decode()
    return edge.read_eval("app", "v1", edge.JSON, text.encode())


def sent(task: Task) -> InferRequest:
    """Return the request as an instance reads it."""
    if not task.body:
        return task.request
    parts, length = bodies.serialized(task.request, task.body)
    serialized = b"".join(parts)
    assert len(serialized) == length
    return InferRequest.FromString(serialized)


@pytest.mark.parametrize("uri", [LARGE_URI, LARGE_URI.replace("data:", "DaTa:")])
@pytest.mark.parametrize("attribute", [None, {"name": "x"}])
@pytest.mark.parametrize("params", [None, {"limit": 3, "a,b": [1, 2]}])
def test_large_data_uri_passes_unparsed(uri: str, attribute: Any, params: Any) -> None:
    document = {"data": {"uri": uri, "attribute": attribute}, "params": params, "more": [{}] * 100}
    task = read(document)
    assert task.body
    assert task.body.is_uri
    [resource] = sent(task).data
    assert resource.uri == uri
    assert resource.attribute_json == ("" if attribute is None else json.dumps(attribute))
    assert sent(task).params_json == ("" if params is None else json.dumps(params))
    assert not sent(task).group


@pytest.mark.parametrize(
    "data",
    [
        {"uri": "http://host/" + "x" * LARGE_BYTES},
        {"uri": LARGE_URI + "\\"},
        {"uri": LARGE_URI + "é"},
        {"uri": LARGE_URI + "\n"},
        [{"uri": LARGE_URI}],
        [{"uri": LARGE_URI}, {"uri": LARGE_URI}],
    ],
)
def test_other_large_requests_are_parsed(data: Any) -> None:
    task = read({"data": data}, ensure_ascii=False)
    assert not task.body
    resources = data if isinstance(data, list) else [data]
    assert [each.uri for each in task.request.data] == [each["uri"] for each in resources]
    assert task.request.group == isinstance(data, list)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b'{"data":{"uri":1%s}}' % (b"0" * LARGE_BYTES), "malformed"),
        ({"data": {"attribute": LARGE_URI}}, "missing required field `uri`"),
        ({"data": {"uri": None, "attribute": LARGE_URI}}, "got `null`"),
        ({"params": LARGE_URI}, "missing required field `data`"),
        (json.dumps({"data": {"uri": LARGE_URI}}).encode()[:-2], "malformed JSON"),
        (json.dumps({"data": {"uri": LARGE_URI}}).encode() + b"x", "malformed JSON"),
        (b'{"data":{"uri":"' + LARGE_URI.encode() + b'"},"params":' + b"[" * 100_000, "malformed"),
    ],
)
def test_malformed_large_requests_get_the_errors_of_small_ones(document: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        read(document)


@given(st.binary(max_size=50), st.integers(0, 100))
def test_changed_documents_are_read_alike(change: bytes, at: int) -> None:
    """A document with some bytes changed is the same request, or refused, whether it is large or not."""
    outcomes = []
    for padding in ("", "QUJD" * LARGE_BYTES):
        head, tail = b'{"data":{"uri":"data:;base64,', b'","attribute":{"a":1}},"params":[1]}'
        changed = head[:at] + change + head[at + len(change) :] + padding.encode() + tail
        outcome: Any = None
        with suppress(InvalidArgument):
            request = sent(edge.read_eval("app", "v1", edge.JSON, changed))
            uris = [each.uri.replace(padding, "") if padding else each.uri for each in request.data]
            outcome = (uris, [each.attribute_json for each in request.data], request.params_json, request.group)
        outcomes.append(outcome)
    assert outcomes[0] == outcomes[1]


def test_body_in_parts_is_one_resource() -> None:
    request = InferRequest(params_json="{}")
    parts, _ = bodies.serialized(request, Body([b"a" * 1000, b"b" * 1000], attribute_json='"x"'))
    expected = InferRequest(data=[Resource(body=b"a" * 1000 + b"b" * 1000, attribute_json='"x"')], params_json="{}")
    assert InferRequest.FromString(b"".join(parts)) == expected
