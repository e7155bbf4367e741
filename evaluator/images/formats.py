"""Finds out an image's format and reads its header in one pass, before a decoder gets the image.

A few bytes can make a decoder use a lot of memory and time. The PNG, WebP and JPEG modules therefore walk the chunks
and segments themselves and refuse such images. Pillow reads the headers of BMP and GIF, which it bounds well enough.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from evaluator.images import bmp, gif, jpeg, png, webp
from evaluator.images.header import Header, undecodable
from evaluator.limits import Limits

_READERS: tuple[tuple[re.Pattern[bytes], Callable[[bytes, Limits], Header]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), jpeg.read_header),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), png.read_header),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), webp.read_header),
    (re.compile(rb"GIF8[79]a"), gif.read_header),
    (re.compile(rb"BM"), bmp.read_header),
)


def read_header(data: bytes, limits: Limits) -> Header:
    """Return the header of an image that is within the limits and costs a decoder no more than its pixels do.

    Raises InvalidArgument if the format is unknown, the header is malformed, or the image is too large.
    """
    for signature, read in _READERS:
        if signature.match(data):
            return read(data, limits)
    raise undecodable("it is not a JPEG, PNG, BMP, WebP or GIF")
