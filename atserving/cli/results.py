"""Show a net's result as text, or as a value for JSON. A result is a JSON value, or bytes: a stream."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from atserving import uris
from atserving.cli.tables import printable
from atserving.errors import InvalidArgument

_LONGEST_TEXT = 100
_LONGEST_LIST = 8
_SHOWN = 3
"""How many items of a longer list are printed."""
_SHOWN_FLOATS = 5

_Coordinate = Annotated[float, Meta(ge=-(1 << 20), le=1 << 20)]
_Point = Annotated[list[_Coordinate], Meta(min_length=2, max_length=2)]
_Color = Annotated[list[Annotated[int, Meta(ge=0, le=255)]], Meta(min_length=3, max_length=3)]


class Confidence(msgspec.Struct):
    """A class of an image, from ``classify``."""

    index: int
    class_: str = msgspec.field(name="class")
    score: float


class Detection(msgspec.Struct):
    """A box on an image, from ``detect``; ``pts`` are its corners in pixels."""

    pts: Annotated[list[_Point], Meta(min_length=1)]
    index: int
    class_: str = msgspec.field(name="class")
    score: float


class Region(Detection):
    """A region of a mask, from ``segment``; ``pts`` is its outline, ``color`` red, green and blue."""

    color: _Color


class Classified(msgspec.Struct):
    """A result of ``classify``."""

    confidences: list[Confidence]


class Detected(msgspec.Struct):
    """A result of ``detect``."""

    detections: list[Detection]


class Segmented(msgspec.Struct):
    """A result of ``segment``; ``mask`` is a data URI."""

    mask: str
    detections: list[Region]


_Kind = TypeVar("_Kind", Classified, Detected, Segmented)


def read_as(kind: type[_Kind], result: Any) -> _Kind | None:
    """Return the result as a value of ``kind``, without its other fields, or None if it is of another kind."""
    try:
        return msgspec.convert(result, kind)
    except msgspec.ValidationError:
        return None


def lines(result: Any) -> list[str]:
    """Return the lines that show a result to a person: a table for a built-in net's result, else indented JSON.

    Long values of other results are cut. No line has control characters.
    """
    return [printable(line) for line in _lines(result)]


def as_json(result: Any) -> Any:
    """Return the value that stands for a result in JSON: a data URI for a stream."""
    if isinstance(result, bytes):
        return "data:application/octet-stream;base64," + base64.b64encode(result).decode()
    return result


def dumps(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON in readable Unicode. Integers may have any size, which orjson refuses."""
    # A lone surrogate has no UTF-8, but an escape.
    return json.dumps(value, ensure_ascii=False, indent=indent).encode(errors="backslashreplace").decode()


def cut(value: Any) -> Any:
    """Return a JSON value with long texts and lists cut: their beginnings, and how long they are."""
    if isinstance(value, dict):
        return {name: cut(each) for name, each in value.items()}
    if isinstance(value, list):
        if len(value) > _LONGEST_LIST:
            return [*map(cut, value[:_SHOWN]), f"... {len(value) - _SHOWN} more"]
        return [cut(each) for each in value]
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        return f"{value[: _LONGEST_TEXT // 2]}... {len(value)} characters"
    return value


def _lines(result: Any) -> list[str]:
    if isinstance(result, bytes):
        return [_stream(result)]
    for kind, show in ((Segmented, _regions), (Detected, _boxes), (Classified, _classes)):
        known: Any = read_as(kind, result)
        # A script's result may have more fields, which a table would hide.
        if known is not None and msgspec.to_builtins(known) == result:
            return show(known)
    return dumps(cut(result), indent=2).splitlines()


def _classes(result: Classified) -> list[str]:
    return _table(("index", "class", "score"), [_class(each) for each in result.confidences])


def _boxes(result: Detected) -> list[str]:
    return _table(("index", "class", "score", "box"), [(*_class(each), _box(each.pts)) for each in result.detections])


def _regions(result: Segmented) -> list[str]:
    rows = [
        (*_class(each), "#" + bytes(each.color).hex(), _bounds(each.pts), f"{len(each.pts)} points")
        for each in result.detections
    ]
    return [_mask(result.mask), *_table(("index", "class", "score", "color", "box", "outline"), rows)]


def _class(each: Confidence | Detection) -> tuple[str, str, str]:
    return str(each.index), each.class_, f"{each.score:.6f}"


def _box(pts: Sequence[Sequence[float]]) -> str:
    """Return the left top and right bottom of an upright box, or all corners of another shape."""
    (left, top), (right, bottom) = pts[0], pts[len(pts) // 2]
    upright = list(pts) == [[left, top], [right, top], [right, bottom], [left, bottom]]
    return _bounds(pts) if upright else " ".join(f"{x:g},{y:g}" for x, y in pts)


def _bounds(pts: Sequence[Sequence[float]]) -> str:
    xs, ys = [x for x, _ in pts], [y for _, y in pts]
    return f"{min(xs):g},{min(ys):g} {max(xs):g},{max(ys):g}"


def _mask(uri: str) -> str:
    """Describe a mask by the header of its PNG."""
    try:
        png = uris.decode_data(uri)
        width, height = struct.unpack_from(">II", png, 16)
    except (InvalidArgument, struct.error):
        return f"mask: {len(uri)} characters"
    return f"mask: {width}x{height} pixels"


def _stream(body: bytes) -> str:
    """Describe a stream: as float32, which ``feature`` returns, if its length allows it."""
    if not body or len(body) % 4:
        return f"a stream of {len(body)} bytes"
    count = len(body) // 4
    values = struct.unpack_from(f"<{min(count, _SHOWN_FLOATS)}f", body)
    more = " ..." if count > _SHOWN_FLOATS else ""
    return f"a stream of {len(body)} bytes, {count} as float32: {' '.join(f'{each:g}' for each in values)}{more}"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return ["nothing found"]
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
