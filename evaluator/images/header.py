"""The header of an image, and what the modules of all formats share: errors, the size check, Pillow's reading."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import Image

from atserving.errors import InvalidArgument
from evaluator.limits import Limits

_BROKEN = "its data is broken or cut short"
_UNREADABLE = "its header is broken, or its variant of the format is not supported"
_TOO_MANY_PIXELS = "the image has far too many pixels"

# No release can allow more pixels than this. Pillow refuses to open a larger image.
_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
_EXIF_ORIENTATION = 0x0112

# Pillow warns on standard error about large images and odd EXIF: the former are refused here, the latter is harmless.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class Header:
    """An image's ``format`` (Pillow's name), stored ``width`` and ``height``, and EXIF ``orientation`` (1: none).

    ``data`` are the bytes to decode, without parts that do not affect the pixels. ``needs_pillow`` is True if OpenCV
    would decode them wrongly.
    """

    format: str
    width: int
    height: int
    orientation: int
    data: bytes
    needs_pillow: bool = False

    @property
    def swaps_axes(self) -> bool:
        """Whether the stored width is the upright image's height."""
        return self.orientation >= 5

    @property
    def upright_size(self) -> tuple[int, int]:
        """(width, height) of the upright image."""
        return (self.height, self.width) if self.swaps_axes else (self.width, self.height)


def undecodable(reason: str = _BROKEN) -> InvalidArgument:
    """Return the error for an image that is malformed or not supported."""
    return InvalidArgument(f"the image can't be decoded: {reason}")


def check_size(width: int, height: int, limits: Limits) -> None:
    """Raise InvalidArgument if an image of this size, in pixels, is over the limits."""
    if width > limits.max_width or height > limits.max_height:
        raise InvalidArgument(f"the image is {width}x{height} pixels, more than {limits.max_width}x{limits.max_height}")
    if width * height > _MAX_PIXELS:
        raise InvalidArgument(_TOO_MANY_PIXELS)


def read_with_pillow(format_: str, data: bytes, limits: Limits, *, needs_pillow: bool = False) -> Header:
    """Return the header that Pillow reads. Raise InvalidArgument if it can't, or if the image is over the limits."""
    try:
        with Image.open(io.BytesIO(data), formats=[format_]) as image:
            width, height = image.size
            # Pillow may decode the image to find its EXIF, so the size is checked first.
            check_size(width, height, limits)
            orientation = _orientation(image)
    except (InvalidArgument, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise InvalidArgument(_TOO_MANY_PIXELS) from None
    except Exception:
        raise undecodable(_UNREADABLE) from None
    return Header(format_, width, height, orientation, data, needs_pillow)


def orientation_of_stub(stub: bytes) -> int:
    """Return the orientation from a stub PNG or JPEG that holds an image's EXIF and XMP only; 1 if there is none.

    Reading a stub is cheap, whatever else the image contains.
    """
    try:
        with Image.open(io.BytesIO(stub), formats=["PNG", "JPEG"]) as image:
            return _orientation(image)
    except Exception:
        return 1


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
