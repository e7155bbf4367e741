"""Images as nets take them: checked against the release's limits from their header alone, then decoded to BGR.

JPEG, PNG, BMP, WebP and GIF (the first frame) are decoded; nothing else is. Pillow reads the header, OpenCV the pixels.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from atserving.errors import InvalidArgument
from evaluator.values import Values

Pixels = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")

_EXIF_ORIENTATION = 0x0112
_SAMPLE_SIDE = 32
# What Pillow would say of an image on standard error (too large, odd EXIF) is ours to say, or does not matter.
warnings.filterwarnings("ignore", module=r"PIL\.")
# What OpenCV says of a bad image goes to the caller as a 400, not to standard error.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


@dataclass(frozen=True)
class Limits:
    """What an image may measure. The defaults are the contract's (section 4); a release may set its own."""

    max_bytes: int = 10 << 20
    max_width: int = 4999
    max_height: int = 4999

    @staticmethod
    def of_release(custom_values: Mapping[str, Any]) -> Limits:
        """Those that ``max_bytes``, ``max_width`` and ``max_height`` set. Raises StartError."""
        values = Values("custom_values", custom_values)
        return Limits(
            values.positive_int("max_bytes", Limits.max_bytes),
            values.positive_int("max_width", Limits.max_width),
            values.positive_int("max_height", Limits.max_height),
        )


def decode(data: bytes, limits: Limits) -> Pixels:
    """The image as (height, width, 3) uint8 in BGR, upright as its EXIF orientation says; alpha is dropped.

    16-bit samples keep their high byte; CMYK and palettes are converted. Raises InvalidArgument for what is no image of
    a known format, is broken or cut short, or is over the limits: the latter before any pixel is decoded.
    """
    if len(data) > limits.max_bytes:
        raise InvalidArgument(f"the image is larger than {limits.max_bytes} bytes")
    width, height, orientation = _header(data)
    if width > limits.max_width or height > limits.max_height:
        raise InvalidArgument(f"the image is {width}x{height} pixels, more than {limits.max_width}x{limits.max_height}")
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        pixels = None
    # A header that says another size than the pixels have is a forged one.
    if pixels is None or pixels.shape != (height, width, 3):
        raise InvalidArgument("the image can't be decoded: its data is broken or cut short")
    return _upright(pixels.astype(np.uint8, copy=False), orientation)


def sample() -> bytes:
    """A small grey picture, as a PNG, to try a net with."""
    return cv2.imencode(".png", np.full((_SAMPLE_SIDE, _SAMPLE_SIDE, 3), 127, np.uint8))[1].tobytes()


def _header(data: bytes) -> tuple[int, int, int]:
    """Width, height and EXIF orientation (1 where there is none)."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            try:
                orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
            except Exception:
                orientation = 1
    except Image.DecompressionBombError:
        raise InvalidArgument("the image has far too many pixels") from None
    except Exception:
        raise InvalidArgument("the image can't be decoded: it is not a JPEG, PNG, BMP, WebP or GIF") from None
    return width, height, orientation if isinstance(orientation, int) else 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undoes an EXIF orientation (Exif 2.32, tag 0x0112): 2 to 4 mirror or turn over, 5 to 8 also swap the axes."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
