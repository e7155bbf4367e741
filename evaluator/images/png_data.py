"""Measures and unpacks the pixel data of a PNG: one zlib stream of rows, split over IDAT chunks (PNG, 10)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator

# The passes of an interlaced PNG (8.2): first column, first row, column step, row step.
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
# Larger rows are checked but not kept: keeping them would double the memory that decoding takes.
_MAX_KEPT_BYTES = 64 << 20
_PIECE_BYTES = 1 << 16
# The longest stored block of deflate (RFC 1951, 3.2.4); a flag and its length come before it.
_BLOCK_BYTES = (1 << 16) - 1
_STREAM_START = b"\x78\x01"
_LAST_BLOCK = b"\x01\x00\x00\xff\xff"


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a PNG chunk: the data's length, the type, the data and a checksum (5.3)."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def rows_bytes(width: int, height: int, pixel_bits: int, interlaced: bool) -> int:
    """Return the size of all rows after unpacking. Each row begins with one byte for its filter."""
    total = 0
    for x, y, dx, dy in _PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * pixel_bits + 7) // 8)
    return total


def store_unpacked(parts: Iterable[bytes], expected_bytes: int) -> bytes | None:
    """Unpack a zlib stream and return it as IDAT chunks that hold it uncompressed, in stored blocks.

    libpng also unpacks data after the last row, where one byte can become 1032; this bounds it. Decoding then takes a
    fifth more time than without a check. A check that kept nothing would take three quarters more.

    ``expected_bytes`` is the size of the rows. Return None if the stream is fine but its rows are too large to keep.
    Raise ValueError if it holds far more than its rows, or is broken.
    """
    kept: list[bytes] | None = [chunk(b"IDAT", _STREAM_START)] if expected_bytes <= _MAX_KEPT_BYTES else None
    total, checksum = 0, 1
    for block in _unpacked(parts):
        total += len(block)
        if total > expected_bytes + _MAX_SURPLUS_BYTES:
            raise ValueError("the PNG has far more data than pixels")
        if kept is not None:
            checksum = zlib.adler32(block, checksum)
            kept.append(chunk(b"IDAT", struct.pack("<BHH", 0, len(block), len(block) ^ 0xFFFF) + block))
    if kept is None:
        return None
    kept.append(chunk(b"IDAT", _LAST_BLOCK + struct.pack(">I", checksum)))
    return b"".join(kept)


def _unpacked(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the stream in blocks of at most ``_BLOCK_BYTES``.

    Parts are cut into pieces, as zlib copies the rest of its input with every block.
    """
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
