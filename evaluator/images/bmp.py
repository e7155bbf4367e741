"""Reads a BMP's header, and finds the variants that OpenCV decodes wrongly."""

from __future__ import annotations

import struct

from evaluator.images.header import Header, read_with_pillow
from evaluator.limits import Limits

_CORE_HEADER_BYTES = 12
_BITFIELDS = 3


def read_header(data: bytes, limits: Limits) -> Header:
    """Return the header of a BMP."""
    return read_with_pillow("BMP", data, limits, needs_pillow=_needs_pillow(data))


def _needs_pillow(data: bytes) -> bool:
    """Whether pixels are bit fields: OpenCV ignores their masks, and does not scale 5 bits to 8."""
    (header_bytes,) = struct.unpack_from("<I", data, 14) if len(data) >= 18 else (0,)
    if header_bytes == _CORE_HEADER_BYTES and len(data) >= 26:
        return data[24] == 16
    if len(data) >= 34:
        bits, compression = struct.unpack_from("<HI", data, 28)
        return bool(bits == 16 or compression == _BITFIELDS)
    return False
