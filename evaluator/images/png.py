"""Reads a PNG's header chunk by chunk, and keeps only the chunks that a decoder needs.

Section numbers are those of the PNG specification, second edition.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence

from evaluator.images import png_data
from evaluator.images.header import Header, check_size, orientation_of_stub, undecodable
from evaluator.limits import Limits

_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_MAX_CHUNKS = 10_000
# A chunk's length, type and checksum take 12 bytes; IHDR's data take 13.
_CHUNK_BYTES = 12
_IHDR_BYTES = 13
_IHDR_START = b"\0\0\0\x0dIHDR"
# Samples in a pixel, by colour type (11.2.2).
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# libpng may unpack compressed data up to this size unchecked, as a check adds a sixth to the time. Deflate's ratio is
# at most 1032: the 129 MiB that this may become take as long as the largest ordinary image.
_MAX_UNCHECKED_BYTES = 1 << 17
# Data that is larger than the rows that it holds is checked, too: encoders store what they can't compress.
_MOST_OVERHEAD_BYTES = 1 << 10
# Text chunks that may contain an orientation begin so: they hold EXIF or XMP.
_PROFILE_STARTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_MAX_PROFILES = 3
# A larger profile is not searched for an orientation. Pillow also bounds the size that it unpacks a profile to.
_MAX_PROFILE_BYTES = 1 << 20

# The two halves of a PNG of one pixel. With profiles between them it is a stub to read the orientation from.
_STUB_START = _SIGNATURE + png_data.chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
_STUB_END = png_data.chunk(b"IDAT", zlib.compress(b"\0\0")) + png_data.chunk(b"IEND", b"")


def read_header(data: bytes, limits: Limits) -> Header:
    """Return the header of a PNG, with the critical chunks as its data.

    OpenCV's pixels do not depend on the other chunks, but libpng would unpack some of them.
    """
    if data[8:16] != _IHDR_START or len(data) < len(_SIGNATURE) + _CHUNK_BYTES + _IHDR_BYTES:
        raise undecodable("the PNG does not begin with its header")
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    check_size(width, height, limits)
    before, pixels, after, profiles = [_SIGNATURE], list[bytes](), list[bytes](), list[bytes]()
    for kind, chunk in _chunks(data):
        if kind == b"IDAT":
            pixels.append(chunk)
        elif _is_critical(kind):
            (after if pixels else before).append(chunk)
        elif len(profiles) < _MAX_PROFILES and (kind == b"eXIf" or chunk.startswith(_PROFILE_STARTS, 8)):
            profiles.append(chunk)
    rows_bytes = png_data.rows_bytes(width, height, depth * _SAMPLES.get(colour, 0), bool(interlaced))
    stored_bytes = rows_bytes + rows_bytes // 64 + _CHUNK_BYTES * len(pixels) + _MOST_OVERHEAD_BYTES
    if sum(map(len, pixels)) > min(_MAX_UNCHECKED_BYTES, stored_bytes):
        pixels = _checked(pixels, rows_bytes)
    return Header("PNG", width, height, orientation(profiles), b"".join([*before, *pixels, *after]))


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield each chunk up to IEND as its type and all its bytes: length, type, data, checksum (5.3)."""
    offset = len(_SIGNATURE)
    for _ in range(_MAX_CHUNKS):
        if offset + _CHUNK_BYTES > len(data):
            raise undecodable()
        length, kind = struct.unpack_from(">I4s", data, offset)
        end = offset + _CHUNK_BYTES + length
        if end > len(data):
            raise undecodable("a PNG chunk is longer than the rest of the image's data")
        yield kind, data[offset:end]
        if kind == b"IEND":
            return
        offset = end
    raise undecodable(f"the PNG has more than {_MAX_CHUNKS} chunks")


def _is_critical(kind: bytes) -> bool:
    """Whether a decoder needs chunks of this type: bit 5 of its first byte is clear (5.4)."""
    return not kind[0] & 0x20


def _checked(pixels: list[bytes], rows_bytes: int) -> list[bytes]:
    """Return IDAT chunks with the same rows. Raise InvalidArgument if they unpack to far more than ``rows_bytes``."""
    try:
        stored = png_data.store_unpacked((chunk[8:-4] for chunk in pixels), rows_bytes)
    except ValueError as error:
        raise undecodable(str(error)) from None
    return pixels if stored is None else [stored]


def orientation(profiles: Sequence[bytes]) -> int:
    """Return the orientation in chunks that hold EXIF or XMP; 1 if there is none."""
    small = [profile for profile in profiles if len(profile) <= _MAX_PROFILE_BYTES]
    return orientation_of_stub(b"".join([_STUB_START, *small, _STUB_END])) if small else 1
