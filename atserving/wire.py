"""The wire format of protobuf messages, as far as large bodies need it: they pass through without copies.

A message of protobuf copies a field when it is set, parsed, read and serialized. See protobuf.dev, «Encoding».
"""

from __future__ import annotations

from collections.abc import Sequence

Buffer = bytes | bytearray | memoryview

LARGE_BYTES = 1 << 15
"""Bodies below this cost less as fields of a message."""

_LENGTH_DELIMITED = 2
_MOST_VARINT_BYTES = 10
# A message of ours whose last field is large has a few others before it.
_MOST_BEFORE = 64


def field_head(number: int, length: int) -> bytes:
    """Return what comes before the bytes of a field of this length."""
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(length)


def cut_tail(start: Buffer, length: int, path: Sequence[int]) -> tuple[bytes, int] | None:
    """Cut the last field off a serialized message of ``length`` bytes, of which ``start`` is the first part.

    ``path`` has the number of the field, and before it those of the messages that hold it. Return the message with that
    field empty, and the offset of the field's bytes, which reach to the end of the message. Return None if the message
    ends otherwise, ``start`` does not reach so far, or more than a few fields come before.
    """
    heads: list[tuple[int, bytes]] = []
    at = 0
    for number in path:
        began = at
        for _ in range(_MOST_BEFORE):
            found = _read_head(start, at)
            if found is None:
                return None
            tag, size, after = found
            if after + size == length and tag == number << 3 | _LENGTH_DELIMITED:
                break
            if after + size > len(start):
                return None
            at = after + size
        else:
            return None
        heads.append((number, bytes(start[began:at])))
        at = after
    small = b""
    for number, before in reversed(heads):
        small = before + field_head(number, len(small)) + small
    return small, at


def cut_head(message: Buffer, path: Sequence[int]) -> tuple[bytes, int, int] | None:
    """Cut the first field out of a serialized message, or of the message in its first field, and so on by ``path``.

    Return the message with that field empty, and where the field's bytes begin and end. Return None if the message
    begins otherwise, or is not whole.
    """
    ends: list[int] = []
    at, end = 0, len(message)
    for number in path:
        found = _read_head(message, at)
        if found is None or found[0] != number << 3 | _LENGTH_DELIMITED or found[2] + found[1] > end:
            return None
        ends.append(end)
        at, end = found[2], found[2] + found[1]
    small, after = b"", end
    for number, outer in zip(reversed(path), reversed(ends), strict=True):
        small = field_head(number, len(small)) + small + bytes(message[after:outer])
        after = outer
    return small, at, end


def first_field(message: Buffer) -> tuple[int, int, int] | None:
    """Return the number of a message's first field, and where its value begins and ends.

    Return None if the field is not length-delimited, or not whole.
    """
    found = _read_head(message, 0)
    if found is None:
        return None
    tag, length, start = found
    return None if start + length > len(message) else (tag >> 3, start, start + length)


def field_spans(message: Buffer, number: int, most: int) -> list[tuple[int, int]] | None:
    """Return where the values of a message's length-delimited fields of one number begin and end.

    Return None if the message has more than ``most`` fields in all, or a group: no message of ours has one, and it
    would hide what follows. A message that is malformed has the fields up to there.
    """
    spans: list[tuple[int, int]] = []
    at, size = 0, len(message)
    fields = 0
    while at < size:
        fields += 1
        if fields > most:
            return None
        tag = _read_varint(message, at)
        if tag is None:
            break
        at = tag[1]
        match tag[0] & 7:
            case 0:
                value = _read_varint(message, at)
                if value is None:
                    break
                at = value[1]
            case 1:
                at += 8
            case 5:
                at += 4
            case 2:
                length = _read_varint(message, at)
                if length is None:
                    break
                at = length[1] + length[0]
                if tag[0] >> 3 == number and at <= size:
                    spans.append((length[1], at))
            case _:
                return None
    return spans


def _read_head(data: Buffer, at: int) -> tuple[int, int, int] | None:
    """Return the tag of a length-delimited field, its length, and where its bytes begin; None for other fields."""
    tag = _read_varint(data, at)
    if tag is None or tag[0] & 7 != _LENGTH_DELIMITED:
        return None
    length = _read_varint(data, tag[1])
    return None if length is None else (tag[0], *length)


def _read_varint(data: Buffer, at: int) -> tuple[int, int] | None:
    """Return a number, and where it ends; None if the data ends before it, or it is too long."""
    value = 0
    for shift, byte in enumerate(data[at : at + _MOST_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, at + shift + 1
    return None


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
