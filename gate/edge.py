"""Reads the bodies of the HTTP API, and writes results and errors as such bodies. No gRPC, no routing.

Spec, section 2. This module parses JSON once, and only as deep as the gate needs: ``params`` and ``attribute`` stay
text, so that integers of any size survive.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from atserving.counting import MAX_GROUP, TooMany, check_data, check_objects
from atserving.errors import (
    Internal,
    InvalidArgument,
    PayloadTooLarge,
    ServingError,
    Unauthenticated,
    UnsupportedMediaType,
)
from atserving.v1 import evaluator_pb2, serving_pb2
from atserving.wire import LARGE_BYTES
from gate.bodies import Body
from gate.dispatch import EvalResult, Task
from gate.responses import LargeResponse, Response

JSON = "application/json"
BYTES = "application/octet-stream"
_STREAM = b',"stream":"data:application/octet-stream;base64,'
_NULL = b"null"


class _Resource(msgspec.Struct):
    uri: str
    attribute: msgspec.Raw = msgspec.Raw(_NULL)


class _Eval(msgspec.Struct):
    data: _Resource | list[_Resource]
    params: msgspec.Raw = msgspec.Raw(_NULL)


class _RawResource(msgspec.Struct):
    uri: msgspec.Raw
    attribute: msgspec.Raw = msgspec.Raw(_NULL)


class _LargeEval(msgspec.Struct):
    data: _RawResource
    params: msgspec.Raw = msgspec.Raw(_NULL)


class _Task(_Eval, kw_only=True):
    op: str


_DecodedT = TypeVar("_DecodedT")
_EVAL = msgspec.json.Decoder(_Eval)
_LARGE_EVAL = msgspec.json.Decoder(_LargeEval)
_TASKS = msgspec.json.Decoder(list[msgspec.Raw])
_TASK = msgspec.json.Decoder(_Task)
_ANY = msgspec.json.Decoder(msgspec.Raw)
_NO_JSON = Internal("the instance's response is malformed")


@dataclass(frozen=True)
class Reply:
    """An HTTP response."""

    body: bytes
    content_type: str = JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def read_eval(app: str, version: str, content_type: str, body: bytes) -> Task:
    """Read the task of an eval request. Raises InvalidArgument or UnsupportedMediaType."""
    if is_json(content_type):
        if len(body) >= LARGE_BYTES and (task := _with_large_uri(app, version, body)):
            return task
        _count(check_data, body, MAX_GROUP, too_many_resources)
        return _task(app, version, _decode(_EVAL, body))
    if not is_bytes(content_type):
        raise UnsupportedMediaType(f"content type {content_type[:80]!r} should be {JSON} or {BYTES}")
    if not body:
        raise InvalidArgument("the body is empty")
    return Task(app, version, evaluator_pb2.InferRequest(data=[serving_pb2.Resource(body=body)]))


def _with_large_uri(app: str, version: str, document: bytes) -> Task | None:
    """Return the task of an eval of one data URI, without a copy of it; None for others, and for wrong ones."""
    if b"\\" in document or not document.isascii():
        return None
    try:
        fields = _LARGE_EVAL.decode(document)
    except (msgspec.DecodeError, RecursionError):
        return None
    uri = memoryview(fields.data.uri)
    if len(uri) < LARGE_BYTES or bytes(uri[:6]).lower() != b'"data:':
        return None
    request = evaluator_pb2.InferRequest(params_json=_text(fields.params))
    return Task(app, version, request, Body([uri[1:-1]], is_uri=True, attribute_json=_text(fields.data.attribute)))


def read_batch(content_type: str, body: bytes, most: int) -> list[Task | ServingError]:
    """Read the tasks of a batch; a malformed task becomes an error of its own.

    Raises a ServingError if the batch itself is malformed or has more than ``most`` tasks.
    """
    if not is_json(content_type):
        raise UnsupportedMediaType(f"content type {content_type[:80]!r} should be {JSON}")
    _count(check_objects, body, most, lambda: too_many_tasks(most))
    items = _decode(_TASKS, body)
    check_batch(len(items), most)
    return [_batch_task(item) for item in items]


def check_batch(tasks: int, most: int) -> None:
    """Raise a ServingError if a batch has no task, or more than ``most``."""
    if not tasks:
        raise InvalidArgument("the batch is empty")
    if tasks > most:
        raise too_many_tasks(most)


def too_many_tasks(most: int) -> PayloadTooLarge:
    """Return the error for a batch of more than ``most`` tasks."""
    return PayloadTooLarge(f"the batch has more than {most} tasks")


def too_many_resources() -> InvalidArgument:
    """Return the error for a request with more resources than it may have."""
    return InvalidArgument(f"the request has more than {MAX_GROUP} resources")


def _batch_task(item: msgspec.Raw) -> Task | ServingError:
    try:
        _count(check_data, item, MAX_GROUP, too_many_resources)
        task = _decode(_TASK, item)
        return _task(*_read_op(task.op), task)
    except ServingError as error:
        return error


def _read_op(op: str) -> tuple[str, str]:
    match op.split("/"):
        case ["", "v1", "eval", app] if app:
            return app, ""
        case ["", "v1", "eval", app, version] if app and version:
            return app, version
    raise InvalidArgument(f"bad op {op[:80]!r}: should be /v1/eval/<app>[/<version>]")


def is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == JSON


def is_bytes(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == BYTES


def _count(
    check: Callable[[bytes | msgspec.Raw, int], None],
    document: bytes | msgspec.Raw,
    most: int,
    error: Callable[[], ServingError],
) -> None:
    """Raise the error if a document has more elements than it may. A malformed one passes: its reader refuses it."""
    try:
        check(document, most)
    except TooMany:
        raise error() from None
    except msgspec.ValidationError as wrong:
        # Its elements are no objects, and there may be millions of them.
        raise InvalidArgument(f"malformed request: {wrong}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass


def _decode(decoder: msgspec.json.Decoder[_DecodedT], body: bytes | msgspec.Raw) -> _DecodedT:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"malformed request: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"malformed JSON: {error}") from None
    except RecursionError:
        raise InvalidArgument("malformed JSON: nested too deeply") from None


def _task(app: str, version: str, fields: _Eval) -> Task:
    group = isinstance(fields.data, list)
    resources = fields.data if isinstance(fields.data, list) else [fields.data]
    if not resources:
        raise InvalidArgument("data is an empty list")
    if len(resources) > MAX_GROUP:
        raise too_many_resources()
    request = evaluator_pb2.InferRequest(
        data=[serving_pb2.Resource(uri=each.uri, attribute_json=_text(each.attribute)) for each in resources],
        group=group,
        params_json=_text(fields.params),
    )
    return Task(app, version, request)


def _text(document: msgspec.Raw) -> str:
    """Return the document as sent, or an empty text for null."""
    text = bytes(document)
    try:
        return "" if text == _NULL else text.decode()
    except UnicodeDecodeError:
        raise InvalidArgument("malformed JSON: not UTF-8") from None


def write_answer(answer: EvalResult) -> Reply:
    """Return the response of an eval: JSON, or the net's bytes unchanged."""
    headers = {"x-serving-version": answer.version}
    response = answer.response
    if isinstance(response, LargeResponse):
        if response.is_stream:
            return Reply(bytes(response.result), BYTES, headers=headers)
    elif response.WhichOneof("outcome") == "stream":
        return Reply(response.stream, BYTES, headers=headers)
    return Reply(_item(answer), headers=headers)


def write_error(error: ServingError) -> Reply:
    """Return the response of a failed request. A net's own code goes into the body, next to the HTTP status."""
    headers = {"x-serving-version": error.version} if error.version else {}
    if error.retry_after_s is not None:
        headers["retry-after"] = retry_after(error)
    headers |= rate_limit(error)
    headers |= challenge(error)
    return Reply(_error_item(error), status=error.status, headers=headers)


def rate_limit(error: ServingError) -> list[tuple[str, str]]:
    """Return the headers that tell of a limit of the caller (draft-ietf-httpapi-ratelimit-headers)."""
    if not error.limit:
        return []
    name = error.limit.partition(";")[0]
    return [("ratelimit-policy", error.limit), ("ratelimit", f"{name};r=0;t={retry_after(error)}")]


def challenge(error: ServingError) -> list[tuple[str, str]]:
    """Return the header of a 401: how to show who one is."""
    return [("www-authenticate", error.challenge or "Bearer")] if error.status == Unauthenticated.status else []


def retry_after(error: ServingError) -> str:
    """Return the value of the ``retry-after`` header: whole seconds, at least one."""
    return str(max(1, -int(-(error.retry_after_s or 0) // 1)))


def write_batch(results: list[EvalResult | ServingError], tasks: Sequence[Task | ServingError] = ()) -> Reply:
    """Return the response of a batch: one item for each of ``tasks``, in order.

    A result that is no JSON would reach into the items beside it. If those may be another app's, it becomes an error.
    """
    apart = len({task.app for task in tasks if isinstance(task, Task)}) > 1
    items = []
    for each in results:
        if isinstance(each, ServingError):
            items.append(_error_item(each))
        else:
            items.append(_error_item(_NO_JSON) if apart and not _is_whole(each.response) else _item(each))
    return Reply(b"[" + b",".join(items) + b"]")


def _is_whole(response: Response) -> bool:
    """Return whether a result is one JSON document, or a stream."""
    try:
        if not isinstance(response, LargeResponse):
            if response.result_json:
                _ANY.decode(response.result_json)
        elif not response.is_stream:
            # A small one is text already.
            _ANY.decode(str(response.result, "utf-8"))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _item(answer: EvalResult) -> bytes:
    response = answer.response
    start = b'{"code":0,"message":' + msgspec.json.encode(response.message)
    if isinstance(response, LargeResponse):
        if response.is_stream:
            return b"".join((start, _STREAM, base64.b64encode(response.result), b'"}'))
        return b"".join((start, b',"result":', response.result, b"}"))
    if response.WhichOneof("outcome") == "stream":
        return start + _STREAM + base64.b64encode(response.stream) + b'"}'
    return start + b',"result":' + (response.result_json.encode() or b"null") + b"}"


def _error_item(error: ServingError) -> bytes:
    return msgspec.json.encode({"code": error.code, "message": error.message})
