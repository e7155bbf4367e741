"""Images of few bytes that cost much to decode or to label, made in code."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

_SIDE = 4999
_NOISE_SIDE = 300
_UNPACKED_MIB = 300


def _plain() -> bytes:
    """Return a WebP of one colour, as large as images may be."""
    out = io.BytesIO()
    Image.new("RGB", (_SIDE, _SIDE), (90, 120, 30)).save(out, "WEBP", lossless=True)
    return out.getvalue()


def _noise() -> bytes:
    """Return a PNG of coarse noise, as large as images may be: nearly every label on it is a region of its own."""
    noise = np.random.default_rng(0).integers(0, 256, (_NOISE_SIDE, _NOISE_SIDE), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((_SIDE, _SIDE), Image.Resampling.NEAREST).save(out, "PNG", optimize=True)
    return out.getvalue()


def _unpacking() -> bytes:
    """Return a PNG of 64 x 64 whose data unpacks to 300 MiB."""
    packer = zlib.compressobj(9)
    data = b"".join([packer.compress(bytes(1 << 20)) for _ in range(_UNPACKED_MIB)]) + packer.flush()
    header = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


COSTLY: Mapping[str, Callable[[], bytes]] = {
    "WebP of one colour": _plain,
    "PNG of noise": _noise,
    "PNG that unpacks 300 MiB": _unpacking,
}
"""By name, the functions that make them."""
