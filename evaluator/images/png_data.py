"""The pixels' data of a PNG: one zlib stream of its rows, which its IDAT chunks hold in parts (PNG, 10)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator

# Where each pass of an interlaced PNG begins, and its steps: x, y, dx, dy (PNG, 8.2).
_PASSES = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
_MAX_SURPLUS_BYTES = 1 << 20
# Rows of more are not kept, which would take twice as much memory for a while.
_MAX_KEPT_BYTES = 64 << 20
_PIECE_BYTES = 1 << 16
# Of a block that is stored as it is, at most; a flag and its length come before (RFC 1951, 3.2.4).
_BLOCK_BYTES = (1 << 16) - 1
_STREAM_START = b"\x78\x01"
_LAST_BLOCK = b"\x01\x00\x00\xff\xff"


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk: its data's length, its type, its data and a checksum (PNG, 5.3)."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def row_bytes(width: int, height: int, pixel_bits: int, interlaced: bool) -> int:
    """How many bytes all rows are, unpacked: each has one for its filter."""
    total = 0
    for x, y, dx, dy in _PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * pixel_bits + 7) // 8)
    return total


def stored(parts: Iterable[bytes], expected: int) -> bytes | None:
    """The same data as IDAT chunks that hold it unpacked; None: it is right as it is, and too much to keep.

    libpng unpacks what is behind the last row too, and a byte may become 1032. What is given it so costs a fifth more
    than to let it unpack; to unpack all twice costs three quarters. ``expected`` is how many bytes the rows are. Raises
    ValueError where they are far more, or the stream is broken.
    """
    kept: list[bytes] | None = [chunk(b"IDAT", _STREAM_START)] if expected <= _MAX_KEPT_BYTES else None
    total, checksum = 0, 1
    for block in _unpacked(parts):
        total += len(block)
        if total > expected + _MAX_SURPLUS_BYTES:
            raise ValueError("the PNG has far more data than pixels")
        if kept is not None:
            checksum = zlib.adler32(block, checksum)
            kept.append(chunk(b"IDAT", struct.pack("<BHH", 0, len(block), len(block) ^ 0xFFFF) + block))
    if kept is None:
        return None
    kept.append(chunk(b"IDAT", _LAST_BLOCK + struct.pack(">I", checksum)))
    return b"".join(kept)


def _unpacked(parts: Iterable[bytes]) -> Iterator[bytes]:
    """In blocks of at most ``_BLOCK_BYTES``; parts are cut too, as what is not yet unpacked is copied each time."""
    stream = zlib.decompressobj()
    for part in parts:
        for start in range(0, len(part), _PIECE_BYTES):
            piece = part[start : start + _PIECE_BYTES]
            while piece and not stream.eof:
                try:
                    block = stream.decompress(piece, _BLOCK_BYTES)
                except zlib.error:
                    raise ValueError("its data is broken or cut short") from None
                if block:
                    yield block
                piece = stream.unconsumed_tail
