"""Decodes a call's request to the ``req`` of a net (:mod:`evaluator.net_contract`)."""

from __future__ import annotations

import json
import secrets
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

import structlog
from google.protobuf.message import DecodeError

from atserving import link, wire
from atserving.errors import Internal, InvalidArgument
from atserving.v1 import evaluator_pb2, serving_pb2
from evaluator.limits import Budget, Limits, check_request, decode, too_large
from evaluator.net_contract import Req
from evaluator.runtime import memory_limit

log = structlog.get_logger()

# Where an InferRequest has the body or the URI of its first resource.
_DATA = evaluator_pb2.InferRequest.DATA_FIELD_NUMBER
_SOURCES = [
    (_DATA, number) for number in (serving_pb2.Resource.BODY_FIELD_NUMBER, serving_pb2.Resource.URI_FIELD_NUMBER)
]


def read(serialized: link.Buffer, limits: Limits, built_in: str | None) -> Req:
    """Return the request of a serialized ``InferRequest``. Its resources are bodies and data URIs.

    ``built_in`` names the built-in net; None for a script. Raises InvalidArgument; MemoryError if memory is short.
    """
    rest, large = serialized, None
    if len(serialized) >= wire.LARGE_BYTES:
        rest, large = _cut(serialized)
    try:
        request = evaluator_pb2.InferRequest.FromString(cast(bytes, rest))
    except DecodeError as error:
        if memory_limit.is_shortage(error):
            raise MemoryError from error
        raise InvalidArgument("the request is malformed") from None
    check_request(request, built_in)
    resources = request.data
    budget = Budget(limits.max_request_bytes)
    first = _data(resources[0], large, limits, budget)
    req: Req = {"data": first}
    if request.group or len(resources) != 1:
        req["data"] = [first, *(_data(each, None, limits, budget) for each in resources[1:])]
    if request.params_json:
        req["params"] = _json(request.params_json, "params")
    return req


def _cut(serialized: link.Buffer) -> tuple[link.Buffer, link.Buffer | None]:
    """Cut a large first resource out, which a message would copy twice: return the rest, and its body or URI."""
    for path in _SOURCES:
        if cut := wire.cut_head(serialized, path):
            rest, start, end = cut
            return rest, memoryview(serialized)[start:end]
    return serialized, None


def _data(resource: serving_pb2.Resource, large: link.Buffer | None, limits: Limits, budget: Budget) -> dict[str, Any]:
    """Return a resource; ``large`` is its body or URI if it was cut out. Raises InvalidArgument."""
    if resource.HasField("uri"):
        # The front has fetched others.
        body = decode(resource.uri if large is None else large, limits.max_bytes, budget)
    else:
        body = resource.body if large is None else bytes(large)
        if len(body) > limits.max_bytes:
            raise too_large("the resource", limits.max_bytes)
    data: dict[str, Any] = {"uri": "", "body": body}
    if resource.attribute_json:
        data["attribute"] = _json(resource.attribute_json, "attribute")
    return data


def _json(text: str, what: str) -> Any:
    """Parse one JSON document, with integers of any size. Direct callers may send text that is no JSON."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (json.JSONDecodeError, _NoConstant, RecursionError):
        raise InvalidArgument(f"{what} is not JSON") from None
    except ValueError:
        # Python bounds the digits, since parsing takes quadratic time.
        digits = sys.get_int_max_str_digits()
        raise InvalidArgument(f"{what} has an integer of more than {digits} digits") from None


class _NoConstant(Exception):  # noqa: N818 - caught where it is raised
    """NaN or an infinity, which Python's parser accepts but JSON does not have."""


def _no_constant(name: str) -> NoReturn:
    raise _NoConstant


@dataclass
class Files:
    """The resources of a script's request as files, until the reply."""

    folder: Path
    _paths: list[Path] = field(default_factory=list)

    def write(self, req: Req) -> None:
        """Write each resource to a file and set its ``uri`` to the path. Raises Internal."""
        for data in req["data"] if isinstance(req["data"], list) else [req["data"]]:
            path = self.folder / secrets.token_hex(8)
            self._paths.append(path)
            try:
                path.write_bytes(data["body"])
            except OSError as error:
                log.error("resource write failed", reason=error.strerror)
                raise Internal("the evaluator's workspace is full or broken") from error
            data["uri"] = str(path)

    def remove(self) -> None:
        while self._paths:
            self._paths.pop().unlink(missing_ok=True)
