"""Reads a JPEG's header segment by segment (ITU-T T.81, annex B), and counts its segments and scans."""

from __future__ import annotations

import re
import struct

from evaluator.images.header import Header, check_size, orientation_of_stub, undecodable
from evaluator.limits import Limits

_START = b"\xff\xd8"
# Excludes stuffed bytes, fill bytes and restart markers: they have no segment, and may be anywhere in a scan.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_TEM, _SOI, _EOI, _SOS, _APP1 = 0x01, 0xD8, 0xD9, 0xDA, 0xE1
_FIRST_FRAME = 0xC0
_FRAMES = frozenset(range(_FIRST_FRAME, 0xD0)) - {0xC4, 0xC8, 0xCC}
_MIN_FRAME_BYTES = 10
# An almost empty scan of 25 million pixels takes 10 to 20 ms. Encoders write about 10 scans, rarely 20.
_MAX_SCANS = 50
_MAX_SEGMENTS = 1000
# APP1 segments that may contain an orientation begin so: they hold EXIF or XMP.
_PROFILE_STARTS = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")
_STUB_END = b"\xff\xda\0\2"


def read_header(data: bytes, limits: Limits) -> Header:
    """Return the header of a JPEG.

    A marker is 0xff and a byte for its kind; most are followed by a length and the rest of their segment. Like libjpeg,
    this skips all bytes between segments, which are the scans' data.
    """
    frame = b""
    profiles: dict[bytes, bytes] = {}
    offset = len(_START)
    segments = scans = 0
    while found := _MARKER.search(data, offset):
        offset = found.end()
        kind = data[offset - 1]
        if kind == _EOI:
            break
        if kind == _TEM:
            continue
        end = _segment_end(data, offset)
        if kind < _FIRST_FRAME or kind == _SOI:
            raise undecodable("the JPEG has an invalid marker")
        segments += 1
        scans += kind == _SOS
        if segments > _MAX_SEGMENTS or scans > _MAX_SCANS:
            raise undecodable(f"the JPEG has more than {_MAX_SEGMENTS} segments or {_MAX_SCANS} scans")
        if kind in _FRAMES and not frame:
            frame = data[offset - 2 : end]
        elif kind == _APP1 and not scans:
            for start in _PROFILE_STARTS:
                if data.startswith(start, offset + 2):
                    profiles.setdefault(start, data[offset - 2 : end])
        offset = end
    if len(frame) < _MIN_FRAME_BYTES:
        raise undecodable()
    height, width = struct.unpack_from(">HH", frame, 5)
    check_size(width, height, limits)
    stub = b"".join([_START, *profiles.values(), frame, _STUB_END])
    return Header("JPEG", width, height, orientation_of_stub(stub) if profiles else 1, data)


def _segment_end(data: bytes, offset: int) -> int:
    """Return the offset behind a segment whose length is at ``offset``; the length counts its own two bytes."""
    (length,) = struct.unpack_from(">H", data, offset) if offset + 2 <= len(data) else (0,)
    if length < 2 or offset + length > len(data):
        raise undecodable()
    return offset + int(length)
