"""Scan the wire format of protocol buffers in place.

Weights make up most of a caffemodel. Parsing them into messages would keep several copies of them in memory. The
scanner walks the fields instead and returns payloads as views of the file's bytes.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

VARINT, FIXED64, LENGTH, GROUP_START, GROUP_END, FIXED32 = range(6)

# A real net has a few thousand fields outside its weights. Without a limit, a crafted file could take minutes to scan.
MAX_FIELDS = 1_000_000


class WireError(ValueError):
    """The bytes are not a valid protocol buffer."""


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a message.

    Attributes:
        value: the integer of a varint; 0 for other wire types.
        start, stop: the payload's offsets in the file, [start, stop).
    """

    number: int
    wire_type: int
    value: int
    start: int
    stop: int


class Scanner:
    """A scanner for the fields of one file's messages.

    Args:
        data: the bytes of the whole file. Fields refer to them by offset.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._fields_left = MAX_FIELDS

    def fields(self, start: int, stop: int) -> Iterator[Field]:
        """Yield the fields of the message at [start, stop).

        Raises:
            WireError: the bytes are not a message, or the file has more than `MAX_FIELDS` fields.
        """
        position = start
        while position < stop:
            field = self.field(position, stop)
            yield field
            position = field.stop

    def run(self, field: Field, stop: int) -> tuple[NDArray[np.uint8], int]:
        """Return the payloads of `field` and of all directly following fields with the same number.

        Valid only for fixed-size fields with a number below 16, because their tag is one byte.

        Returns:
            uint8 (n, 4) or (n, 8), a view of the file's bytes, and the offset of the next field.
        """
        size = 4 if field.wire_type == FIXED32 else 8
        first = field.start - 1
        most = (stop - first) // (size + 1)
        table = np.frombuffer(self.data, np.uint8, most * (size + 1), first).reshape(most, size + 1)
        tag, found, look = table[0, 0], 1, 64
        # Growing steps make the cost proportional to the run's length, not to the rest of the file.
        while found < most:
            other = np.flatnonzero(table[found : found + look, 0] != tag)
            if other.size:
                found += int(other[0])
                break
            found = min(found + look, most)
            look *= 2
        return table[:found, 1:], first + found * (size + 1)

    def field(self, position: int, stop: int) -> Field:
        """Return the field at `position` in a message that ends at `stop`.

        Raises:
            WireError: the bytes are not a field, or the file has more than `MAX_FIELDS` fields.
        """
        self._spend()
        key, position = self._varint(position, stop)
        number, wire_type = key >> 3, key & 7
        if number == 0:
            raise WireError(f"byte {position}: a field has the number 0")
        if wire_type == VARINT:
            value, end = self._varint(position, stop)
            return Field(number, wire_type, value, position, end)
        if wire_type == LENGTH:
            length, position = self._varint(position, stop)
            end = position + length
        elif wire_type in (FIXED32, FIXED64):
            end = position + (4 if wire_type == FIXED32 else 8)
        else:
            raise WireError(f"byte {position}: a field has the wire type {wire_type}")
        if end > stop:
            raise WireError(f"byte {position}: a field ends {end - stop} bytes after the end")
        return Field(number, wire_type, 0, position, end)

    def _varint(self, position: int, stop: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if position >= stop:
                raise WireError(f"byte {position}: the data ends inside a number")
            byte = self.data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, position
        raise WireError(f"byte {position}: a number has more than ten bytes")

    def _spend(self) -> None:
        self._fields_left -= 1
        if self._fields_left < 0:
            raise WireError(f"the data has more than {MAX_FIELDS} fields")

    def varints(self, start: int, stop: int) -> list[int]:
        """Return the numbers of a packed repeated field as signed 64-bit integers."""
        numbers = []
        while start < stop:
            self._spend()
            value, start = self._varint(start, stop)
            numbers.append(signed(value))
        return numbers


def signed(value: int) -> int:
    """Convert a varint's unsigned value to a signed 64-bit integer."""
    return value - (1 << 64) if value >> 63 else value


def length_field(number: int, length: int) -> bytes:
    """Return the tag and length that precede a payload of `length` bytes."""
    return _varint_bytes(number << 3 | LENGTH) + _varint_bytes(length)


def _varint_bytes(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])
