"""From a call, as gates send it, to the `req` of a net's functions (`evaluator/net_contract.py`)."""

from __future__ import annotations

import json
import secrets
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import structlog

from atserving.errors import Internal, InvalidArgument
from atserving.v1 import evaluator_pb2, serving_pb2
from evaluator.net_contract import Req

log = structlog.get_logger()


def read(request: evaluator_pb2.InferRequest, max_bytes: int) -> Req:
    """The request, whose resources have been fetched, ``max_bytes`` each at most. Raises InvalidArgument."""
    data = [_data(resource, max_bytes) for resource in request.data]
    req: Req = {"data": data if request.group or len(data) != 1 else data[0]}
    if request.params_json:
        req["params"] = _json(request.params_json, "params")
    return req


def _data(resource: serving_pb2.Resource, max_bytes: int) -> dict[str, Any]:
    data: dict[str, Any] = {"uri": "", "body": resource.body}
    if len(data["body"]) > max_bytes:
        raise InvalidArgument(f"the resource is larger than {max_bytes} bytes")
    if resource.attribute_json:
        data["attribute"] = _json(resource.attribute_json, "attribute")
    return data


def _json(text: str, what: str) -> Any:
    """The value, integers as they are; the gate has sent one document, but a direct caller might not."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (json.JSONDecodeError, _NoConstant, RecursionError):
        raise InvalidArgument(f"{what} is not JSON") from None
    except ValueError:
        # Python's own bound, as reading takes the square of the digits.
        digits = sys.get_int_max_str_digits()
        raise InvalidArgument(f"{what} has an integer of more than {digits} digits") from None


class _NoConstant(Exception):  # noqa: N818 - caught where it is raised
    """NaN or an infinity, which Python reads and JSON has not."""


def _no_constant(name: str) -> NoReturn:
    raise _NoConstant


@dataclass
class Files:
    """A request's resources as files, for a script, until it is answered."""

    folder: Path
    _paths: list[Path] = field(default_factory=list)

    def write(self, req: Req) -> None:
        """Gives each resource the local path as its ``uri``. Raises Internal."""
        for data in req["data"] if isinstance(req["data"], list) else [req["data"]]:
            path = self.folder / secrets.token_hex(8)
            self._paths.append(path)
            try:
                path.write_bytes(data["body"])
            except OSError as error:
                log.error("a resource can't be written to the workspace", reason=error.strerror)
                raise Internal("the evaluator's workspace is full or broken") from error
            data["uri"] = str(path)

    def remove(self) -> None:
        while self._paths:
            self._paths.pop().unlink(missing_ok=True)
