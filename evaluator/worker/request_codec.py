"""Decodes a call's request to the ``req`` of a net (:mod:`evaluator.net_contract`)."""

from __future__ import annotations

import json
import math
import re
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

# orjson writes 254 levels: some are left to the net's answer.
_MOST_LEVELS = 128
_SURROGATE = re.compile(r"\\u[dD][89A-Fa-f]")


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
    """Parse one JSON document, with integers of any size, which an answer can repeat.

    Direct callers may send text that is no JSON.
    """
    try:
        document = _DECODER.decode(text)
    except (json.JSONDecodeError, _NoConstant):
        raise InvalidArgument(f"{what} is not JSON") from None
    except _TooLarge:
        raise InvalidArgument(f"{what} has a number beyond {sys.float_info.max:.2g}") from None
    except RecursionError:
        raise _too_deep(what) from None
    except ValueError:
        # Python bounds the digits, since parsing takes quadratic time.
        digits = sys.get_int_max_str_digits()
        raise InvalidArgument(f"{what} has an integer of more than {digits} digits") from None
    if text.count("[") + text.count("{") > _MOST_LEVELS and _is_deep(document):
        raise _too_deep(what)
    if _SURROGATE.search(text):
        try:
            json.dumps(document, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InvalidArgument(f"{what} has half of a surrogate pair") from None
    return document


class _NoConstant(Exception):  # noqa: N818 - caught where it is raised
    """NaN or an infinity, which Python's parser accepts but JSON does not have."""


class _TooLarge(Exception):  # noqa: N818 - caught where it is raised
    """A number that Python's parser takes for an infinity."""


def _no_constant(name: str) -> NoReturn:
    raise _NoConstant


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _TooLarge
    return number


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)


def _is_deep(document: object) -> bool:
    level = [document]
    for _ in range(_MOST_LEVELS):
        lists = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [each for inner in lists for each in inner]
    return any(isinstance(each, dict | list) for each in level)


def _too_deep(what: str) -> InvalidArgument:
    return InvalidArgument(f"{what} is nested more than {_MOST_LEVELS} levels deep")


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
