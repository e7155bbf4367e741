"""Images as nets take them: checked against the release's limits from their header alone, then decoded to BGR.

JPEG, PNG, BMP, WebP and GIF (the first frame) are decoded; nothing else is. OpenCV decodes, but for some BMPs.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from atserving.errors import InvalidArgument
from evaluator.images.headers import Header, read_header, undecodable
from evaluator.limits import Limits

Pixels = NDArray[np.uint8]

# As cv2.flip has it: around the horizontal axis, the vertical one, or both.
_FLIPS = {4: 0, 8: 0, 2: 1, 6: 1, 3: -1, 7: -1}
_READ = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_REDUCED = (8, 4, 2)
_SAMPLE_SIDE = 32
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
    a known format, is malformed or cut short, or is over the limits: the latter before any pixel is decoded. Damage
    within the pixels' data that its format has no check for is not seen: that of a JPEG, which decodes to wrong or grey
    pixels from there on, also where it was cut and ended anew, of a WebP and of a BMP.
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
    header = read_header(data, limits)
    divisor = _divisor(header, least)
    try:
        pixels = _decoded(header, divisor)
    except (cv2.error, OSError, ValueError):
        pixels = None
    # A header that says another size than the pixels have is a forged one.
    if pixels is None or pixels.shape != (-(-header.height // divisor), -(-header.width // divisor), 3):
        raise undecodable()
    return Picture(_upright(pixels, header), header.upright_size)


@functools.cache
def sample() -> bytes:
    """A small grey picture, as a PNG, to try a net with."""
    return cv2.imencode(".png", np.full((_SAMPLE_SIDE, _SAMPLE_SIDE, 3), 127, np.uint8))[1].tobytes()


def _decoded(header: Header, divisor: int) -> Pixels | None:
    """The stored pixels, in BGR; None, or an error of the decoder's, where they can't be had."""
    if header.by_pillow:
        with Image.open(io.BytesIO(header.data), formats=[header.form]) as image:
            return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
    pixels = cv2.imdecode(np.frombuffer(header.data, np.uint8), _READ[divisor] | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if pixels is None else pixels.astype(np.uint8, copy=False)


def _divisor(header: Header, least: tuple[int, int] | None) -> int:
    """By how much a JPEG may be decoded smaller, so that it is still as wide and as high as ``least``."""
    if least is None or header.form != "JPEG":
        return 1
    width, height = header.upright_size
    return next((by for by in _REDUCED if -(-width // by) >= least[0] and -(-height // by) >= least[1]), 1)


def _upright(pixels: Pixels, header: Header) -> Pixels:
    """Undoes an EXIF orientation (Exif 2.32, tag 0x0112): 2 to 4 mirror or turn over, 5 to 8 also swap the axes."""
    turned = cv2.transpose(pixels) if header.turned else pixels
    if header.orientation in _FLIPS:
        turned = cv2.flip(turned, _FLIPS[header.orientation])
    return turned.astype(np.uint8, copy=False)
