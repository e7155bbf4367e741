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
from evaluator.limits import check_request, too_large
from evaluator.net_contract import Req

log = structlog.get_logger()

# Where an InferRequest has the body of a resource.
_BODY = (evaluator_pb2.InferRequest.DATA_FIELD_NUMBER, serving_pb2.Resource.BODY_FIELD_NUMBER)


def read(serialized: link.Buffer, max_bytes: int, built_in: str | None) -> Req:
    """Return the request of a serialized ``InferRequest``. Its resources are bodies of at most ``max_bytes`` each.

    ``built_in`` names the built-in net; None for a script. Raises InvalidArgument.
    """
    # A large body that is all of a request is cut out: a message would copy it twice.
    cut = wire.cut_tail(serialized, len(serialized), _BODY) if len(serialized) >= wire.LARGE_BYTES else None
    try:
        request = evaluator_pb2.InferRequest.FromString(cast(bytes, serialized) if cut is None else cut[0])
    except DecodeError:
        raise InvalidArgument("the request is malformed") from None
    check_request(request, built_in)
    data = [_data(resource, max_bytes) for resource in request.data]
    if cut is not None:
        data[-1]["body"] = _bounded(bytes(serialized[cut[1] :]), max_bytes)
    req: Req = {"data": data if request.group or len(data) != 1 else data[0]}
    if request.params_json:
        req["params"] = _json(request.params_json, "params")
    return req


def _data(resource: serving_pb2.Resource, max_bytes: int) -> dict[str, Any]:
    if resource.HasField("uri"):
        # The front fetches what a uri names, so nothing was to be fetched.
        raise InvalidArgument("the request's data has a uri that was not fetched")
    data: dict[str, Any] = {"uri": "", "body": _bounded(resource.body, max_bytes)}
    if resource.attribute_json:
        data["attribute"] = _json(resource.attribute_json, "attribute")
    return data


def _bounded(body: bytes, max_bytes: int) -> bytes:
    if len(body) > max_bytes:
        raise too_large("the resource", max_bytes)
    return body


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
