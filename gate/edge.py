"""The edge's view: JSON requests read, answers and errors written as the bodies of the HTTP API. No gRPC, no routing.

Spec, section 2. JSON is parsed once, here, and integers stay integers.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any

import orjson

from atserving.errors import InvalidArgument, ServingError, UnsupportedMediaType
from atserving.v1 import evaluator_pb2, serving_pb2
from gate.dispatch import Answer, Task

JSON = "application/json"
BYTES = "application/octet-stream"
_STREAM_URI = b"data:application/octet-stream;base64,"


@dataclass(frozen=True)
class Reply:
    """An HTTP response."""

    body: bytes
    content_type: str = JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def read_eval(app: str, version: str, content_type: str, body: bytes) -> Task:
    """The task of an eval request. Raises InvalidArgument or UnsupportedMediaType."""
    if is_json(content_type):
        return _task(app, version, _loads(body))
    if content_type.partition(";")[0].strip().lower() != BYTES:
        raise UnsupportedMediaType(f"content type {content_type[:80]!r} should be {JSON} or {BYTES}")
    if not body:
        raise InvalidArgument("the body is empty")
    return Task(app, version, evaluator_pb2.InferRequest(data=[serving_pb2.Resource(body=body)]))


def read_batch(content_type: str, body: bytes) -> list[Task | ServingError]:
    """The tasks of a batch, each by itself either read or refused. Raises where the batch itself is malformed."""
    if not is_json(content_type):
        raise UnsupportedMediaType(f"content type {content_type[:80]!r} should be {JSON}")
    items = _loads(body)
    if not isinstance(items, list):
        raise InvalidArgument("a batch should be a JSON array of tasks")
    if not items:
        raise InvalidArgument("the batch is empty")
    return [_batch_task(item) for item in items]


def _batch_task(item: Any) -> Task | ServingError:
    try:
        if not isinstance(item, dict):
            raise InvalidArgument("a task should be a JSON object")
        return _task(*_read_op(item.get("op")), item)
    except ServingError as error:
        return error


def _read_op(op: Any) -> tuple[str, str]:
    if not isinstance(op, str):
        raise InvalidArgument("op should be a string such as /v1/eval/<app>[/<version>]")
    match op.split("/"):
        case ["", "v1", "eval", app] if app:
            return app, ""
        case ["", "v1", "eval", app, version] if app and version:
            return app, version
    raise InvalidArgument(f"bad op {op[:80]!r}: should be /v1/eval/<app>[/<version>]")


def is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == JSON


def _loads(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"malformed JSON: {error}") from None


def _task(app: str, version: str, fields: Any) -> Task:
    if not isinstance(fields, dict):
        raise InvalidArgument("the request should be a JSON object with data")
    if "data" not in fields:
        raise InvalidArgument("no data given")
    data, params = fields["data"], fields.get("params")
    group = isinstance(data, list)
    resources = data if group else [data]
    if not resources:
        raise InvalidArgument("data is an empty list")
    request = evaluator_pb2.InferRequest(
        data=[_resource(each) for each in resources],
        group=group,
        params_json="" if params is None else orjson.dumps(params).decode(),
    )
    return Task(app, version, request)


def _resource(fields: Any) -> serving_pb2.Resource:
    if not isinstance(fields, dict):
        raise InvalidArgument('data should be an object such as {"uri": "..."}, or a list of them')
    uri, attribute = fields.get("uri"), fields.get("attribute")
    if not isinstance(uri, str) or not uri:
        raise InvalidArgument("data without a uri" if uri is None else "uri should be a string that is not empty")
    return serving_pb2.Resource(uri=uri, attribute_json="" if attribute is None else orjson.dumps(attribute).decode())


def write_answer(answer: Answer) -> Reply:
    """The response of an eval: JSON, or the net's bytes as they are."""
    headers = {"x-serving-version": answer.version}
    if answer.response.WhichOneof("outcome") == "stream":
        return Reply(answer.response.stream, BYTES, headers=headers)
    return Reply(_item(answer), headers=headers)


def write_error(error: ServingError) -> Reply:
    """The response of a failed request; a net's own code is in the body, beside the HTTP status it maps to."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = retry_after(error)
    return Reply(_error_item(error), status=error.status, headers=headers)


def retry_after(error: ServingError) -> str:
    """The header's value: whole seconds, at least one."""
    return str(max(1, -int(-(error.retry_after_s or 0) // 1)))


def write_batch(results: list[Answer | ServingError]) -> Reply:
    """The response of a batch: one item for each task, in order."""
    items = [_error_item(each) if isinstance(each, ServingError) else _item(each) for each in results]
    return Reply(b"[" + b",".join(items) + b"]")


def _item(answer: Answer) -> bytes:
    response = answer.response
    start = b'{"code":0,"message":' + orjson.dumps(response.message)
    if response.WhichOneof("outcome") == "stream":
        return start + b',"stream":"' + _STREAM_URI + base64.b64encode(response.stream) + b'"}'
    return start + b',"result":' + (response.result_json.encode() or b"null") + b"}"


def _error_item(error: ServingError) -> bytes:
    return orjson.dumps({"code": error.code, "message": error.message})
