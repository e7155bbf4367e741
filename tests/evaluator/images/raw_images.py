"""Builds PNGs, JPEGs and BMPs from parts, also such as no encoder writes."""

from __future__ import annotations

import math
import struct
import zlib

import cv2
import numpy as np

from evaluator.images import Pixels

SIDE = 64
"""The width and height of images whose size does not matter."""

PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples in a pixel of a PNG, by colour type."""


def noise(height: int, width: int, channels: int = 3) -> Pixels:
    return np.random.default_rng(1).integers(0, 255, (height, width, channels), np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    *chunks: bytes, width: int = SIDE, height: int = SIDE, depth: int = 8, colour: int = 2, interlaced: bool = False
) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


BLACK = chunk(b"IDAT", zlib.compress(bytes(SIDE * (SIDE * 3 + 1))))
"""The pixel data of a black PNG of the default size and colour."""


def png_rows_bytes(width: int, height: int, pixel_bits: int, interlaced: bool) -> int:
    """Return the size of a PNG's rows after unpacking, each with its filter byte."""
    if not interlaced:
        return height * (1 + math.ceil(width * pixel_bits / 8))
    # The number of each pixel's pass, in squares of 8x8 pixels (PNG, 8.2).
    square = ["16462646", "77777777", "56565656", "77777777", "36463646", "77777777", "56565656", "77777777"]
    total = 0
    for y, numbers in enumerate(square):
        for number in set(numbers):
            columns = sum(len(range(x, width, 8)) for x in range(8) if numbers[x] == number)
            if columns:
                total += len(range(y, height, 8)) * (1 + math.ceil(columns * pixel_bits / 8))
    return total


def zlib_zeros(times: int) -> bytes:
    """Return a zlib stream of ``times`` 16 MiB of zeros, about a thousandth as long."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    once = packer.compress(bytes(16 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    # Adler's two sums over zeros are 1 and the number of bytes (RFC 1950, 9).
    checksum = ((times << 24) % 65521 << 16) + 1
    return b"\x78\x01" + once * times + b"\x03\x00" + struct.pack(">I", checksum)


def segment(kind: int, data: bytes) -> bytes:
    """Return a JPEG segment."""
    return struct.pack(">BBH", 0xFF, kind, len(data) + 2) + data


def jpeg(*segments: bytes) -> bytes:
    """Return a small JPEG that begins with the segments."""
    plain: bytes = cv2.imencode(".jpg", noise(SIDE, SIDE))[1].tobytes()
    return plain[:2] + b"".join(segments) + plain[2:]


def jpeg_of_scans(side: int, scans: int) -> bytes:
    """Return a progressive, black JPEG. Each scan but the first adds nothing to any block."""
    blocks = (side // 8) ** 2
    frame = struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0])
    # Codes of one bit: "no difference" in the first scan, then "skip 2^14 blocks and as many as 14 more bits say".
    tables = segment(0xC4, bytes([0, 1, *[0] * 15, 0])) + segment(0xC4, bytes([0x10, 1, *[0] * 15, 0xE0]))
    first = segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bytes(math.ceil(blocks / 8))
    runs = "0" * 15 * math.ceil(blocks / (1 << 14))
    runs += "1" * (-len(runs) % 8)
    skip = segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + int(runs, 2).to_bytes(len(runs) // 8, "big")
    head = b"\xff\xd8" + segment(0xDB, bytes([0, *[1] * 64])) + segment(0xC2, frame) + tables
    return head + first + skip * (scans - 1) + b"\xff\xd9"


def bmp(width: int, bits: int, data: bytes, masks: tuple[int, ...] = (), header_bytes: int = 40) -> bytes:
    """Return a BMP of one row. The masks, of red, green and blue, are in a long header or else behind a short one."""
    fields = struct.pack("<IiiHHIIiiII", header_bytes, width, 1, 1, bits, 3 if masks else 0, len(data), 0, 0, 0, 0)
    packed = struct.pack(f"<{len(masks)}I", *masks)
    header = fields + packed + bytes(max(0, header_bytes - len(fields) - len(packed)))
    start = 14 + len(header)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + data
