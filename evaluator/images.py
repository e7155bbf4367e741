"""Images as nets take them: checked against the release's limits from their header alone, then decoded to BGR.

JPEG, PNG, BMP, WebP and GIF (the first frame) are decoded; nothing else is. Pillow reads the header, OpenCV the pixels.
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from atserving.errors import InvalidArgument
from evaluator.limits import Limits

Pixels = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")

_EXIF_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
# As cv2.flip has it: around the horizontal axis, the vertical one, or both.
_FLIPS = {4: 0, 8: 0, 2: 1, 6: 1, 3: -1, 7: -1}
_PNG_HEADER_BYTES = 8
# How the text chunks of a PNG begin that hold EXIF, or XMP, which may have an orientation too.
_PNG_EXIF_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_JPEG = b"\xff\xd8"
_READ = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_REDUCED = (8, 4, 2)
_SAMPLE_SIDE = 32
# What Pillow would say of an image on standard error (too large, odd EXIF) is ours to say, or does not matter.
warnings.filterwarnings("ignore", module=r"PIL\.")
# What OpenCV says of a bad image goes to the caller as a 400, not to standard error.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


@dataclass(frozen=True)
class Picture:
    """A decoded image: ``pixels``, (height, width, 3) uint8 in BGR, upright, and the upright image's own ``size``.

    ``size`` is (width, height); the pixels are fewer where they were decoded to a smaller size.
    """

    pixels: Pixels
    size: tuple[int, int]


def decode(data: bytes, limits: Limits) -> Pixels:
    """The image as (height, width, 3) uint8 in BGR, upright as its EXIF orientation says; alpha is dropped.

    16-bit samples keep their high byte; CMYK and palettes are converted. Raises InvalidArgument for what is no image of
    a known format, is broken or cut short, or is over the limits: the latter before any pixel is decoded.
    """
    return read(data, limits).pixels


def read(data: bytes, limits: Limits, least: tuple[int, int] | None = None) -> Picture:
    """As :func:`decode`, with the image's size.

    A JPEG that is much larger than ``least``, the width and height that are needed of the upright image, is decoded at
    a half, a quarter or an eighth of its size, never to fewer pixels than that; None: whole. That takes less time, and
    its pixels are not quite those that the whole image, resized, has.
    """
    if len(data) > limits.max_bytes:
        raise InvalidArgument(f"the image is larger than {limits.max_bytes} bytes")
    header = _header(data, limits)
    divisor = _divisor(header, least)
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _READ[divisor] | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        pixels = None
    # A header that says another size than the pixels have is a forged one.
    if pixels is None or pixels.shape != (-(-header.height // divisor), -(-header.width // divisor), 3):
        raise InvalidArgument("the image can't be decoded: its data is broken or cut short")
    return Picture(_upright(pixels.astype(np.uint8, copy=False), header.orientation), header.upright_size)


def sample() -> bytes:
    """A small grey picture, as a PNG, to try a net with."""
    return cv2.imencode(".png", np.full((_SAMPLE_SIDE, _SAMPLE_SIDE, 3), 127, np.uint8))[1].tobytes()


@dataclass(frozen=True)
class _Header:
    """Sizes are those that are stored, ``orientation`` EXIF's: 1 where there is none."""

    is_jpeg: bool
    width: int
    height: int
    orientation: int

    @property
    def upright_size(self) -> tuple[int, int]:
        return (self.height, self.width) if self.orientation in _TURNED else (self.width, self.height)


def _header(data: bytes, limits: Limits) -> _Header:
    """What an image says of itself, once it is within the limits."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            # Before its EXIF is read, for which Pillow may decode.
            if width > limits.max_width or height > limits.max_height:
                most = f"{limits.max_width}x{limits.max_height}"
                raise InvalidArgument(f"the image is {width}x{height} pixels, more than {most}")
            return _Header(data.startswith(_JPEG), width, height, _orientation(image, data))
    except InvalidArgument:
        raise
    except Image.DecompressionBombError:
        raise InvalidArgument("the image has far too many pixels") from None
    except Exception:
        raise InvalidArgument("the image can't be decoded: it is not a JPEG, PNG, BMP, WebP or GIF") from None


def _orientation(image: Image.Image, data: bytes) -> int:
    # To find the EXIF that a PNG may have behind its pixels, Pillow decodes them all; few have any.
    if image.format == "PNG" and not _png_has_exif(data):
        return 1
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) else 1


def _png_has_exif(data: bytes) -> bool:
    """Whether a chunk may hold EXIF; a chunk is its length, its type, so many bytes and a checksum (PNG, 5.3)."""
    place = _PNG_HEADER_BYTES
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"eXIf" or data.startswith(_PNG_EXIF_TEXTS, place + 8):
            return True
        place += length + 12
    return False


def _divisor(header: _Header, least: tuple[int, int] | None) -> int:
    """By how much a JPEG may be decoded smaller, so that it is still as wide and as high as ``least``."""
    if least is None or not header.is_jpeg:
        return 1
    width, height = header.upright_size
    return next((by for by in _REDUCED if -(-width // by) >= least[0] and -(-height // by) >= least[1]), 1)


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undoes an EXIF orientation (Exif 2.32, tag 0x0112): 2 to 4 mirror or turn over, 5 to 8 also swap the axes."""
    turned = cv2.transpose(pixels) if orientation in _TURNED else pixels
    if orientation in _FLIPS:
        turned = cv2.flip(turned, _FLIPS[orientation])
    return turned.astype(np.uint8, copy=False)
