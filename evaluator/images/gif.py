"""Reads a GIF's header, and counts the blocks before its first frame (GIF89a, 15)."""

from __future__ import annotations

from evaluator.images.header import Header, read_with_pillow, undecodable
from evaluator.limits import Limits

_MAX_BLOCKS = 10_000
_HEADER_BYTES = 13
_EXTENSION, _FRAME = b"!", b","


def read_header(data: bytes, limits: Limits) -> Header:
    """Return the header of a GIF.

    Pillow reads the blocks before the first frame one by one, in Python. Most GIFs have a handful; a hostile one could
    have millions.
    """
    offset = _HEADER_BYTES + _palette_bytes(data)
    blocks = 0
    while data[offset : offset + 1] == _EXTENSION:
        offset += 2
        while True:
            blocks += 1
            if blocks > _MAX_BLOCKS:
                raise undecodable(f"the GIF has more than {_MAX_BLOCKS} blocks before its first frame")
            if offset >= len(data):
                raise undecodable()
            size = data[offset]
            offset += 1 + size
            # An empty block ends the extension.
            if not size:
                break
    if data[offset : offset + 1] != _FRAME:
        raise undecodable("the GIF has no frame, or its header is broken")
    return read_with_pillow("GIF", data, limits)


def _palette_bytes(data: bytes) -> int:
    """Return the size of the global palette: 3 bytes for each of its 2 to 256 colours."""
    has_palette = len(data) > 10 and data[10] & 0x80
    return 3 << (data[10] & 7) + 1 if has_palette else 0
