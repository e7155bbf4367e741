"""Reads a WebP's header chunk by chunk (RFC 9649), and keeps only the chunks that its first frame needs."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from evaluator.images import png, png_data
from evaluator.images.header import Header, check_size, undecodable
from evaluator.limits import Limits

_START_BYTES, _CHUNK_BYTES = 12, 8
_MAX_CHUNKS = 10_000
# The flags of VP8X that are kept: of transparency and of an animation.
_FLAGS = 0x12
_LOSSY_START, _LOSSLESS_START = b"\x9d\x01\x2a", b"\x2f"
_FRAMES = (b"VP8 ", b"VP8L", b"ANMF")
_PROFILES = {b"EXIF": (b"eXIf", b""), b"XMP ": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0")}


def read_header(data: bytes, limits: Limits) -> Header:
    """Return the header of a WebP, still or animated, with its first frame as its data."""
    size: tuple[int, int] | None = None
    kept, profiles = list[bytes](), list[bytes]()
    has_frame = False
    for kind, start, end in _chunks(data):
        if size is None:
            size = _size(kind, data[start:end])
            check_size(*size, limits)
        if kind == b"VP8X" and not kept:
            kept.append(_chunk(kind, bytes([data[start] & _FLAGS]) + data[start + 1 : end]))
        elif kind in (b"ALPH", b"ANIM", *_FRAMES) and not has_frame:
            kept.append(_chunk(kind, data[start:end]))
            has_frame = kind in _FRAMES
        elif kind in _PROFILES and len(profiles) < len(_PROFILES):
            name, head = _PROFILES[kind]
            profiles.append(png_data.chunk(name, head + data[start:end].removeprefix(b"Exif\0\0")))
    if size is None or not has_frame:
        raise undecodable()
    body = b"".join([b"WEBP", *kept])
    orientation = png.orientation(profiles) if profiles else 1
    return Header("WEBP", *size, orientation, b"RIFF" + struct.pack("<I", len(body)) + body)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield each chunk: its type, and where its data begin and end."""
    (length,) = struct.unpack_from("<I", data, 4)
    end = length + _CHUNK_BYTES
    if end > len(data):
        raise undecodable()
    offset = _START_BYTES
    for _ in range(_MAX_CHUNKS):
        if offset + _CHUNK_BYTES > end:
            return
        kind, length = struct.unpack_from("<4sI", data, offset)
        offset += _CHUNK_BYTES
        if offset + length > end:
            raise undecodable()
        yield kind, offset, offset + length
        # Data of an odd length have one byte more.
        offset += length + length % 2
    raise undecodable(f"the WebP has more than {_MAX_CHUNKS} chunks")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _size(kind: bytes, data: bytes) -> tuple[int, int]:
    """Return the width and height in the first chunk."""
    if kind == b"VP8X" and len(data) >= 10:
        return 1 + int.from_bytes(data[4:7], "little"), 1 + int.from_bytes(data[7:10], "little")
    if kind == b"VP8 " and data[3:6] == _LOSSY_START and len(data) >= 10:
        width, height = struct.unpack_from("<HH", data, 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and data.startswith(_LOSSLESS_START) and len(data) >= 5:
        bits = int.from_bytes(data[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    raise undecodable()
