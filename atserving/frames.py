"""Frames over a byte stream: HEAD, the payload's length and kind, and the payload.

A long frame can travel in pieces, each a frame of the kind PIECE: shorter ones beside it need not wait for its end.
"""

from __future__ import annotations

import mmap
import struct
import threading
from collections.abc import Callable

from atserving.wire import Buffer as Buffer

HEAD = struct.Struct("<IB")
"""The head of a frame: the length of its payload, and its kind."""

PIECE = 0
"""The kind of a piece: :data:`PIECE_HEAD`, and a part of the long frame's payload."""

PIECE_HEAD = struct.Struct("<QBII")
"""The id, the kind and the length of the long frame, and the offset of the piece in it. A sender has one long frame of
an id at a time, and sends its pieces in order. A receiver skips the rest of a frame that it has dropped."""

PIECE_START = struct.Struct(HEAD.format + PIECE_HEAD.format[1:])
"""The two heads of a piece."""

MAX_BYTES = 64 << 20
"""The longest payload of a frame from a peer, whole or in pieces."""

LONG_BYTES = 512 << 10
"""Payloads from here on travel in pieces between gate and instance."""

PIECE_BYTES = 1 << 20
"""The longest part of a long frame in one piece."""

START_BYTES = 1024
"""So much of a large frame tells whose it is. A reader places no frame before that has arrived."""

MAX_SHORT_BYTES = PIECE_BYTES + 1024
"""The longest payload of a frame as it travels between gate and instance: a piece, or a short frame."""

# A longer frame that arrives in parts is collected in a buffer of its own size.
_LARGE = 4096
# A buffer from here on takes memory only as it fills, since its length is the word of a peer. For usual bodies it would
# cost more, a page at a time, than memory that is used again.
_MAPPED = 16 << 20
_READ_BYTES = 1 << 18
# Smaller copies than this find memory, or nothing does.
_LEAST_COPY_BYTES = 4096
# While a long frame arrives, read little in one go: the rest of a piece then goes to its place without a copy.
_READ_BETWEEN_BYTES = 4096


class Malformed(Exception):  # noqa: N818
    """A peer does not keep to the protocol; the message says how."""


def frame(kind: int, payload: bytes = b"") -> bytes:
    """Return a whole frame."""
    return HEAD.pack(len(payload), kind) + payload


def part(data: Buffer, start: int, end: int) -> Buffer:
    """Return a part of what has arrived: small parts as copies, which free the rest; large ones without a copy."""
    return data[start:end] if type(data) is bytes else memoryview(data)[start:end]


Take = Callable[[int, Buffer, int, int], None]
"""Takes a frame of some kind, whose payload is ``data[start:end]``. Raises Malformed."""


def buffer(length: int) -> memoryview:
    """Return a buffer for a large frame. Raises MemoryError."""
    if length < _MAPPED:
        return memoryview(bytearray(length))
    try:
        return memoryview(mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except OSError as error:
        raise MemoryError from error


Place = Callable[[int, int, bytes, int], memoryview | None]
"""Returns a buffer for a frame of a kind and length, or None to skip it. Its payload begins at ``data[start:]``, which
has at least :data:`START_BYTES`."""


class _Long:
    """A long frame that arrives in pieces."""

    __slots__ = ("buffer", "filled", "kind")

    def __init__(self, kind: int, length: int) -> None:
        self.kind = kind
        self.buffer = buffer(length)
        self.filled = 0


class FrameReader:
    """Splits the bytes that arrive into frames, and hands each to ``take``."""

    def __init__(
        self, take: Take, max_bytes: int = MAX_BYTES, max_long_bytes: int = 0, scratch: memoryview | None = None
    ) -> None:
        """``scratch`` is where most bytes are read to; None: the reader has its own."""
        self.reads = True
        """While this is False, frames wait."""
        self.max_bytes = max_bytes
        """The longest payload to take that does not travel in pieces."""
        self.max_long_bytes = max_long_bytes
        """The longest payload to take that does; 0: no pieces."""
        self.admit: Callable[[int, int], bool] = lambda _id, _length: True
        """Whether to take the long frame of an id; asked before its first piece. May raise Malformed."""
        self.take_long: Callable[[int, int, Buffer], None] = lambda _id, kind, data: take(kind, data, 0, len(data))
        """Takes a long frame: its id, kind and payload. Raises Malformed."""
        self.place: Place = lambda _kind, length, _data, _start: buffer(length)
        """Returns where to put a large frame."""
        self._take = take
        self._rest = b""
        # What is being filled: a large frame, or a piece of a long one.
        self._large: memoryview | None = None
        self._large_kind = self._filled = 0
        # How many bytes are still to be skipped.
        self._skip = 0
        self._long_id = 0
        self._long: _Long | None = None
        self._longs: dict[int, _Long] = {}
        self._scratch = scratch or memoryview(bytearray(_READ_BYTES))

    @property
    def partial_bytes(self) -> int:
        """How much of an incomplete frame has arrived."""
        return self._filled if self._large is not None else len(self._rest)

    @property
    def is_amid(self) -> bool:
        """Whether a frame has arrived in part."""
        return bool(self._longs or self._large is not None or self._rest)

    def space(self) -> memoryview:
        """Return where the next bytes should be read to: the rest of a large frame goes to its place."""
        if self._large is not None:
            return self._large[self._filled :]
        return self._scratch[:_READ_BETWEEN_BYTES] if self._longs else self._scratch

    def filled(self, count: int) -> memoryview | None:
        """Take note of ``count`` bytes in the space. Return them if they must be fed before more. Raises Malformed."""
        if self._large is None:
            return self._scratch[:count]
        self._filled += count
        if self._filled == len(self._large):
            self._end_large()
        return None

    def drop(self, id_: int) -> None:
        """Drop the long frame of an id, if one is arriving, and skip what is still to come of it."""
        long = self._longs.pop(id_, None)
        if long and long is self._long:
            # The rest of a piece must not keep the whole frame in memory.
            assert self._large is not None
            self._large = memoryview(bytearray(len(self._large)))

    def close(self) -> None:
        """Take no more, and drop incomplete frames."""
        self.reads = False
        self._rest, self._large, self._long = b"", None, None
        self._longs.clear()

    def feed(self, arrived: bytes | memoryview) -> None:
        """Take what has arrived; nothing, to take the frames that waited. Raises Malformed."""
        if self._skip:
            skipped = min(self._skip, len(arrived))
            self._skip -= skipped
            arrived = arrived[skipped:]
        try:
            data = self._rest + arrived if self._rest else bytes(arrived)
        except MemoryError:
            if len(arrived) <= _LEAST_COPY_BYTES:
                raise
            half = len(arrived) // 2
            self.feed(arrived[:half])
            self.feed(arrived[half:])
            return
        self._rest = b""
        start = 0
        if self._large is not None:
            start = self._fill(data, 0)
            if start < 0:
                return
        size, head = len(data), HEAD.size
        while self.reads and size - start >= head:
            length, kind = HEAD.unpack_from(data, start)
            if length > self.max_bytes:
                raise Malformed(f"a frame of {length} bytes is longer than {self.max_bytes}")
            if kind == PIECE:
                if size - start < PIECE_START.size:
                    break
                self._begin_piece(data, start, length)
                start = self._fill(data, start + PIECE_START.size)
                if start < 0:
                    return
                continue
            end = start + head + length
            if end > size:
                if length < _LARGE or size - start < head + START_BYTES:
                    break
                self._large = self.place(kind, length, data, start + head)
                if self._large is None:
                    self._skip = end - size
                    return
                self._large_kind, self._filled = kind, 0
                self._fill(data, start + head)
                return
            self._take(kind, data, start + head, end)
            start = end
        if start < size:
            self._rest = data[start:] if start else data

    def _begin_piece(self, data: bytes, start: int, length: int) -> None:
        """Find the place for a piece, whose frame begins at ``start``. Raises Malformed."""
        id_, kind, total, offset = PIECE_HEAD.unpack_from(data, start + HEAD.size)
        length -= PIECE_HEAD.size
        end = offset + length
        if kind == PIECE or length <= 0 or end > total or total > self.max_long_bytes:
            raise Malformed(f"a piece of {length} bytes at {offset} of {total}")
        if not offset:
            if id_ in self._longs:
                raise Malformed("a long frame begins twice")
            if self.admit(id_, total):
                self._longs[id_] = _Long(kind, total)
        long = self._longs.get(id_)
        if long and (long.filled != offset or long.kind != kind or len(long.buffer) != total):
            raise Malformed("the pieces of a long frame do not fit")
        self._long_id, self._long = id_, long
        self._large_kind, self._filled = PIECE, 0
        self._large = long.buffer[offset:end] if long else memoryview(bytearray(length))

    def _fill(self, data: bytes, start: int) -> int:
        """Add to the large frame. Return the end of its part of ``data``, or -1 if it is still incomplete."""
        large = self._large
        assert large is not None
        count = min(len(data) - start, len(large) - self._filled)
        large[self._filled : self._filled + count] = data[start : start + count]
        self._filled += count
        if self._filled < len(large):
            return -1
        self._end_large()
        return start + count

    def _end_large(self) -> None:
        large, self._large = self._large, None
        assert large is not None
        if self._large_kind != PIECE:
            self._take(self._large_kind, large, 0, len(large))
            return
        long, self._long = self._long, None
        if long is None or self._longs.get(self._long_id) is not long:
            return
        long.filled += len(large)
        if long.filled == len(long.buffer):
            del self._longs[self._long_id]
            self.take_long(self._long_id, long.kind, long.buffer)


class _Shared(threading.local):
    """The scratch of a thread."""

    def __init__(self) -> None:
        self.scratch = memoryview(bytearray(_READ_BYTES))


shared = _Shared()
"""Has the scratch of all connections of a loop: what is read there is fed before anything else is read."""
