"""Counts what a message holds before anything is made of it: a few bytes on the wire can become an object each."""

from __future__ import annotations

from typing import Any

import msgspec

from atserving.wire import Buffer, field_spans

MAX_GROUP = 64
"""The most resources of one request."""

MAX_JSON_CHARS = 1 << 20
"""The longest that ``params`` and all attributes of one request may be together, as JSON."""

MAX_REQUEST_BYTES = (20 << 20) + (64 << 10)
"""The longest request. The edge takes bodies of up to 20 MiB; the message has a few more fields."""

# So few elements cost nothing, whatever they are.
_FEW = 4096
# What a message of ours has beside its repeated field, and unknown fields.
_OTHER_FIELDS = 64


class TooMany(Exception):  # noqa: N818
    """A message holds more elements than it may."""


def check_repeated(message: Buffer, most: int, number: int, inner: tuple[int, int] | None = None) -> None:
    """Raise TooMany if a serialized message has more than ``most`` fields of this number.

    ``inner`` bounds the fields of those, which are messages: the most in all of them together, and their number.
    Malformed messages pass: their parser refuses them.
    """
    if len(message) < _FEW:
        return
    view = memoryview(message)
    spans = _spans(view, most, number)
    if inner:
        left, number = inner
        for start, end in spans:
            left -= len(_spans(view[start:end], left, number))


def _spans(message: memoryview, most: int, number: int) -> list[tuple[int, int]]:
    spans = field_spans(message, number, most + _OTHER_FIELDS)
    if spans is None or len(spans) > most:
        raise TooMany
    return spans


class _Left:
    """How many more elements the document that is read now may have. One thread reads documents, the event loop's."""

    count = 0


class _Element(msgspec.Struct):
    """An object of which nothing is kept."""

    def __post_init__(self) -> None:
        _Left.count -= 1
        if _Left.count < 0:
            raise TooMany


class _Holder(msgspec.Struct):
    data: _Element | list[_Element]


_OBJECTS = msgspec.json.Decoder(list[_Element])
_HOLDER = msgspec.json.Decoder(_Holder)


def check_objects(document: bytes | msgspec.Raw, most: int) -> None:
    """Raise TooMany if a JSON document, a list of objects, is longer than ``most``.

    Raises msgspec.DecodeError, also for elements that are no objects, and RecursionError.
    """
    _check(_OBJECTS, document, most)


def check_data(document: bytes | msgspec.Raw, most: int) -> None:
    """Raise TooMany if the field ``data`` of a JSON document is a list of more than ``most`` objects.

    Raises what :func:`check_objects` does.
    """
    _check(_HOLDER, document, most)


def _check(decoder: msgspec.json.Decoder[Any], document: bytes | msgspec.Raw, most: int) -> None:
    # Each element but the first has a comma before it. To count commas is far cheaper than to read.
    if len(document) < _FEW or bytes(document).count(b",") < _FEW:
        return
    _Left.count = most
    decoder.decode(document)
