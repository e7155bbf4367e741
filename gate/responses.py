"""The responses of instances. The result of a large one passes through without being parsed."""

from __future__ import annotations

from typing import NamedTuple, cast

from google.protobuf.message import DecodeError

from atserving import wire
from atserving.errors import Internal
from atserving.v1.evaluator_pb2 import Error, InferResponse
from atserving.wire import Buffer


class LargeResponse(NamedTuple):
    """A response whose result is large: parsed and serialized, a text of 47 MiB keeps a gate busy for 0.1 s."""

    result: Buffer
    """The JSON document, in UTF-8, or the net's bytes."""
    is_stream: bool
    message: str
    fetch_us: int = 0
    """The microseconds for which the instance has fetched resources."""


Response = InferResponse | LargeResponse

_RESULTS = (InferResponse.RESULT_JSON_FIELD_NUMBER, InferResponse.STREAM_FIELD_NUMBER)


def read(serialized: Buffer) -> Response:
    """Read a serialized ``InferResponse``; a malformed one becomes an error."""
    try:
        if len(serialized) >= wire.LARGE_BYTES and (large := _large(serialized)):
            return large
        return InferResponse.FromString(cast(bytes, serialized))
    except DecodeError:
        return InferResponse(error=Internal("the instance's response is malformed").to_proto())


def _large(serialized: Buffer) -> LargeResponse | None:
    """Return a response that begins with its result and has a message at most; None for others. Raises DecodeError."""
    found = wire.first_field(serialized)
    if found is None:
        return None
    number, start, end = found
    if number not in _RESULTS or len(serialized) - end >= wire.LARGE_BYTES:
        return None
    rest = InferResponse.FromString(bytes(serialized[end:]))
    if rest.WhichOneof("outcome"):
        return None
    return LargeResponse(
        memoryview(serialized)[start:end], number == InferResponse.STREAM_FIELD_NUMBER, rest.message, rest.fetch_us
    )


def error_of(response: Response) -> Error | None:
    """Return the error that a response has in place of a result."""
    if isinstance(response, LargeResponse) or not response.HasField("error"):
        return None
    return response.error


def size(response: Response) -> int:
    """Return about how many bytes a response takes."""
    return len(response.result) if isinstance(response, LargeResponse) else response.ByteSize()
