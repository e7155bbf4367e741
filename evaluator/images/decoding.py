"""Decodes images to upright BGR pixels, once their headers are within the limits."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from atserving.errors import InvalidArgument
from evaluator.images.formats import read_header
from evaluator.images.header import Header, undecodable
from evaluator.limits import Limits

Pixels = NDArray[np.uint8]

# Flip codes of cv2.flip by EXIF orientation: around the horizontal axis (0), the vertical axis (1) or both (-1).
_FLIPS = {4: 0, 8: 0, 2: 1, 6: 1, 3: -1, 7: -1}
_READ_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_DIVISORS = (8, 4, 2)
_SAMPLE_SIDE = 32
# The most that a decoder takes for a pixel: the pixel itself, and once more with 16 bits or another channel.
_MOST_PIXEL_BYTES = 12
# Errors about bad images go to the caller as a 400; OpenCV would also print them on standard error.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


@dataclass(frozen=True)
class Picture:
    """A decoded image: ``pixels``, upright BGR of shape (height, width, 3), uint8, and the whole image's ``size``.

    ``size`` is the (width, height) of the upright image. There are fewer pixels if the image was decoded smaller.
    """

    pixels: Pixels
    size: tuple[int, int]


def decode(data: bytes, limits: Limits) -> Pixels:
    """Return the image's pixels, upright BGR of shape (height, width, 3), uint8.

    The EXIF orientation is applied. Alpha is dropped, 16-bit samples keep their high byte, CMYK and palettes are
    converted, and an animation gives its first frame.

    Raises InvalidArgument if the format is unknown, the data is malformed or cut short, or the image is over the
    limits; MemoryError if memory is short. No pixel is decoded before the limits are checked. JPEG, WebP and BMP have
    no checksum: damage inside their pixel data gives wrong pixels, not an error. The same holds for a JPEG that was cut
    and got a new end.
    """
    return read(data, limits).pixels


def read(data: bytes, limits: Limits, min_size: tuple[int, int] | None = None) -> Picture:
    """Return the image's pixels, as :func:`decode` does, and its size.

    ``min_size`` is the smallest (width, height) of the upright image that the caller needs. A much larger JPEG is then
    decoded at a half, a quarter or an eighth of its size, but never below ``min_size``. This is faster, and its pixels
    differ slightly from those of the whole image after a resize. None decodes every image whole.
    """
    if len(data) > limits.max_bytes:
        raise InvalidArgument(f"the image is larger than {limits.max_bytes} bytes")
    header = read_header(data, limits)
    divisor = _divisor(header, min_size)
    try:
        pixels = _decode_stored(header, divisor)
    except (cv2.error, OSError, ValueError) as error:
        pixels = None
        if isinstance(error, cv2.error) and error.code == cv2.Error.StsNoMem:
            raise MemoryError from error
    if pixels is None:
        _check_memory(header)
    # If the header gives another size than the pixels have, the header is forged.
    if pixels is None or pixels.shape != (-(-header.height // divisor), -(-header.width // divisor), 3):
        raise undecodable()
    return Picture(_turn_upright(pixels, header), header.upright_size)


@functools.cache
def sample() -> bytes:
    """Return a small grey PNG for trying out a net."""
    return cv2.imencode(".png", np.full((_SAMPLE_SIDE, _SAMPLE_SIDE, 3), 127, np.uint8))[1].tobytes()


def _decode_stored(header: Header, divisor: int) -> Pixels | None:
    """Return the BGR pixels as they are stored, not yet upright. Return None or raise if they can't be decoded."""
    if header.needs_pillow:
        with Image.open(io.BytesIO(header.data), formats=[header.format]) as image:
            return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
    pixels = cv2.imdecode(np.frombuffer(header.data, np.uint8), _READ_FLAGS[divisor] | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if pixels is None else pixels.astype(np.uint8, copy=False)


def _check_memory(header: Header) -> None:
    """Raise MemoryError if a decoder may have lacked memory: most do not tell this from a broken image."""
    np.empty(_MOST_PIXEL_BYTES * header.width * header.height, np.uint8)


def _divisor(header: Header, min_size: tuple[int, int] | None) -> int:
    """Return the largest divisor that keeps a JPEG at least ``min_size`` large; 1 for other formats."""
    if min_size is None or header.format != "JPEG":
        return 1
    width, height = header.upright_size
    return next((by for by in _DIVISORS if -(-width // by) >= min_size[0] and -(-height // by) >= min_size[1]), 1)


def _turn_upright(pixels: Pixels, header: Header) -> Pixels:
    """Undo an EXIF orientation (Exif 2.32, tag 0x0112): 2 to 4 mirror or rotate, 5 to 8 also swap the axes."""
    turned = cv2.transpose(pixels) if header.swaps_axes else pixels
    if header.orientation in _FLIPS:
        turned = cv2.flip(turned, _FLIPS[header.orientation])
    return turned.astype(np.uint8, copy=False)
