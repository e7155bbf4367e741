"""Compares two answers to one request: JSON with a tolerance, streams by their bytes."""

from __future__ import annotations

from typing import Any

import orjson

from atserving.config import Shadow
from atserving.v1.evaluator_pb2 import InferResponse
from atserving.wire import Buffer
from gate.responses import LargeResponse, Response

MAX_JSON_BYTES = 1 << 20
"""Longer documents are compared by their bytes: to parse them would keep a thread busy for long."""

_MOST_SHOWN_CHARS = 40
# What single precision and a text of 17 digits may differ by.
_RELATIVE = 1e-6


def difference(ours: Response, other: Response, shadow: Shadow) -> str:
    """Return where two results differ first; empty if they are the same. May take milliseconds."""
    first, is_stream = _result(ours)
    second, other_is_stream = _result(other)
    if is_stream != other_is_stream:
        return "one is a stream"
    if len(first) == len(second) and first == second:
        return ""
    if is_stream:
        return f"{len(first)} and {len(second)} bytes" if len(first) != len(second) else "other bytes"
    if max(len(first), len(second)) > MAX_JSON_BYTES:
        return "other text, too long to compare as JSON"
    try:
        return _difference(orjson.loads(first), orjson.loads(second), "", 0.0, shadow)
    except orjson.JSONDecodeError:
        return "no JSON"
    except RecursionError:
        return "other text, nested too deeply to compare as JSON"


def _result(response: Response) -> tuple[Buffer, bool]:
    """Return the result of a response, and whether it is a stream."""
    if isinstance(response, LargeResponse):
        return response.result, response.is_stream
    assert isinstance(response, InferResponse)
    if response.WhichOneof("outcome") == "stream":
        return response.stream, True
    return response.result_json.encode(), False


def _difference(ours: Any, other: Any, where: str, tolerance: float, shadow: Shadow) -> str:
    if _is_number(ours) and _is_number(other):
        same = abs(ours - other) <= max(tolerance, _RELATIVE * max(abs(ours), abs(other)))
        if isinstance(ours, int) and isinstance(other, int) and not tolerance:
            same = ours == other
        return "" if same else f"{where}: {_shown(ours)} and {_shown(other)}"
    if type(ours) is not type(other):
        return f"{where}: {_shown(ours)} and {_shown(other)}"
    if isinstance(ours, dict):
        if names := ours.keys() ^ other.keys():
            return f"{where}: only one has {min(names)[:_MOST_SHOWN_CHARS]!r}"
        tolerances = {"score": shadow.score_tolerance, "pts": shadow.box_tolerance}
        parts = ((f"{where}.{name}".lstrip("."), ours[name], other[name], tolerances.get(name, 0.0)) for name in ours)
    elif isinstance(ours, list):
        if len(ours) != len(other):
            return f"{where}: {len(ours)} and {len(other)} items"
        # The points of a box are lists in a list.
        parts = ((f"{where}[{number}]", a, b, tolerance) for number, (a, b) in enumerate(zip(ours, other, strict=True)))
    else:
        return "" if ours == other else f"{where}: {_shown(ours)} and {_shown(other)}"
    return next((found for name, a, b, near in parts if (found := _difference(a, b, name, near, shadow))), "")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else orjson.dumps(value).decode()
    return text if len(text) <= _MOST_SHOWN_CHARS else f"{text[:_MOST_SHOWN_CHARS]}..."
