"""What goes between the evaluator and a script's process: frames over a socket, a call and its reply by turns.

The script's process may read what the evaluator pickled. The evaluator never unpickles: what comes back is protobuf,
JSON, or bytes that it only hands back.
"""

from __future__ import annotations

import math
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

import orjson

from atserving.errors import ServingError
from atserving.v1 import evaluator_pb2
from evaluator.runner import Result

_LENGTH = struct.Struct("<Q")
_MAX_FRAME_BYTES = 8 << 30
_DONE, _FAILED = b"=", b"!"


def send(lane: socket.socket, payload: bytes, until_s: float = math.inf) -> None:
    """Raises TimeoutError at ``until_s`` of the monotonic clock, OSError where the other end has gone."""
    lane.settimeout(_left_s(until_s))
    lane.sendall(_LENGTH.pack(len(payload)))
    lane.sendall(payload)


def receive(lane: socket.socket, until_s: float = math.inf) -> bytearray:
    """One frame. Raises as :func:`send`, and EOFError where the other end has closed, or sends no frames."""
    (length,) = _LENGTH.unpack(_exactly(lane, _LENGTH.size, until_s))
    if length > _MAX_FRAME_BYTES:
        raise EOFError
    return _exactly(lane, length, until_s)


def _exactly(lane: socket.socket, length: int, until_s: float) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        lane.settimeout(_left_s(until_s))
        count = lane.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return data


def _left_s(until_s: float) -> float | None:
    # A timeout of 0 would be another mode: not to wait at all.
    return None if math.isinf(until_s) else max(until_s - time.monotonic(), 1e-6)


def done(payload: bytes) -> bytes:
    """The reply of a call that went well."""
    return _DONE + payload


def failed(error: ServingError) -> bytes:
    """The reply of a call that failed as a whole."""
    return _FAILED + error.to_proto().SerializeToString()


def reply(frame: bytearray) -> bytes:
    """What :func:`done` was given; raises what :func:`failed` was. ValueError, or protobuf's DecodeError: no reply."""
    kind, payload = bytes(frame[:1]), bytes(memoryview(frame)[1:])
    if kind == _FAILED:
        raise ServingError.from_proto(evaluator_pb2.Error.FromString(payload))
    if kind != _DONE:
        raise ValueError("no reply")
    return payload


def from_outcomes(outcomes: Sequence[Result | ServingError]) -> bytes:
    """A batch's outcomes, in order."""
    replies = [evaluator_pb2.Reply(response=_response(outcome)) for outcome in outcomes]
    return evaluator_pb2.ExchangeResponse(replies=replies).SerializeToString()


def to_outcomes(payload: bytes) -> list[Result | ServingError]:
    """What :func:`from_outcomes` was given. Raises protobuf's DecodeError."""
    return [_outcome(each.response) for each in evaluator_pb2.ExchangeResponse.FromString(payload).replies]


def _response(outcome: Result | ServingError) -> evaluator_pb2.InferResponse:
    if isinstance(outcome, ServingError):
        return evaluator_pb2.InferResponse(error=outcome.to_proto())
    if outcome.stream is not None:
        return evaluator_pb2.InferResponse(stream=outcome.stream, message=outcome.message)
    return evaluator_pb2.InferResponse(result_json=(outcome.json or b"null").decode(), message=outcome.message)


def _outcome(response: evaluator_pb2.InferResponse) -> Result | ServingError:
    match response.WhichOneof("outcome"):
        case "stream":
            return Result(response.message, stream=response.stream)
        case "result_json":
            return Result(response.message, json=response.result_json.encode())
        case _:
            return ServingError.from_proto(response.error)


def from_values(**values: Any) -> bytes:
    """Plain values that :func:`to_values` reads."""
    return orjson.dumps(values)


def to_values(payload: bytes) -> dict[str, Any]:
    """Raises ValueError."""
    values: dict[str, Any] = orjson.loads(payload)
    return values
