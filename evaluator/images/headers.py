"""What the bytes of an image say of themselves, read in one pass before any decoder sees them.

PNG and JPEG are walked here, chunk by chunk and segment by segment, so that what a decoder would do with them is
bounded: its memory and its time, which a few bytes can otherwise make very large. Pillow reads the headers of BMP, WebP
and GIF, and the EXIF of all, of a PNG or JPEG without the rest of it.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from PIL import Image

from atserving.errors import InvalidArgument
from evaluator.images import png_data
from evaluator.limits import Limits

_UNKNOWN = "it is not a JPEG, PNG, BMP, WebP or GIF"
_BROKEN = "its data is broken or cut short"
_ODD = "its header is broken, or it is of a kind that is not supported"

# The most pixels of any image, whatever a release allows; Pillow's, beyond which it refuses to open one.
_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
_EXIF_ORIENTATION = 0x0112
# A profile that is larger is not looked at for an orientation; Pillow bounds what it unpacks to as well.
_MAX_PROFILE_BYTES = 1 << 20

_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_CHUNKS = 10_000
_HEADER_BYTES = 13
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Of packed data that libpng may unpack before anyone knows to how much: with deflate's 1032 bytes for one, in a second.
_FEW_PNG_BYTES = 1 << 19
# How the text chunks of a PNG begin that hold EXIF, or XMP, which may have an orientation too.
_PNG_PROFILES = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_MAX_PROFILES = 3

_JPEG = b"\xff\xd8\xff"
# All but stuffed bytes, fill bytes and restarts: those have nothing behind them, and may be anywhere in a scan.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_TEM, _SOI, _EOI, _SOS, _APP1 = 0x01, 0xD8, 0xD9, 0xDA, 0xE1
_FIRST_FRAME = 0xC0
_FRAMES = frozenset(range(_FIRST_FRAME, 0xD0)) - {0xC4, 0xC8, 0xCC}
# At 25 million pixels a scan of next to no bytes takes 10 to 20 ms. Encoders write about 10, and few write 20.
_MAX_SCANS = 50
_MAX_SEGMENTS = 1000
_JPEG_PROFILES = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")

_GIF_BLOCKS = 10_000
_BMP_BITFIELDS = 3


@dataclass(frozen=True)
class Header:
    """Of which ``form`` an image is, its stored ``width`` and ``height``, and EXIF's ``orientation``: 1 where none is.

    ``data`` are the bytes to decode, without what has no part in the pixels; ``by_pillow`` is whether only Pillow
    decodes them right.
    """

    form: str
    width: int
    height: int
    orientation: int
    data: bytes
    by_pillow: bool = False

    @property
    def turned(self) -> bool:
        """Whether the upright image is as wide as the stored one is high."""
        return self.orientation >= 5

    @property
    def upright_size(self) -> tuple[int, int]:
        return (self.height, self.width) if self.turned else (self.width, self.height)


def undecodable(why: str = _BROKEN) -> InvalidArgument:
    return InvalidArgument(f"the image can't be decoded: {why}")


def read_header(data: bytes, limits: Limits) -> Header:
    """The header of an image that is within the limits, and that takes a decoder no more than its pixels do.

    Raises InvalidArgument, of what is no image, is malformed, or is too large.
    """
    form = next((form for start, form in _STARTS if data.startswith(start)), None)
    if form is None or (form == "WEBP" and data[8:12] != b"WEBP"):
        raise undecodable(_UNKNOWN)
    return _READERS[form](data, limits)


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width > limits.max_width or height > limits.max_height:
        raise InvalidArgument(f"the image is {width}x{height} pixels, more than {limits.max_width}x{limits.max_height}")
    if width * height > _MAX_PIXELS:
        raise InvalidArgument("the image has far too many pixels")


def _png(data: bytes, limits: Limits) -> Header:
    """OpenCV gets the chunks without which there is no image; what others do to its pixels is nothing."""
    if data[8:16] != b"\0\0\0\x0dIHDR" or len(data) < len(_PNG) + 12 + _HEADER_BYTES:
        raise undecodable("the PNG does not begin with its header")
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    _check_size(width, height, limits)
    before, pixels, after = [_PNG], list[bytes](), list[bytes]()
    profiles: list[bytes] = []
    packed = 0
    for kind, chunk in _chunks(data):
        if kind == b"IDAT":
            pixels.append(chunk)
            packed += len(chunk)
        # The fifth bit of a type is set in all that one can do without (PNG, 5.4).
        elif not kind[0] & 0x20:
            (after if pixels else before).append(chunk)
        elif len(profiles) < _MAX_PROFILES and (kind == b"eXIf" or chunk.startswith(_PNG_PROFILES, 8)):
            profiles.append(chunk)
    if packed > _FEW_PNG_BYTES:
        rows = png_data.row_bytes(width, height, depth * _SAMPLES.get(colour, 0), bool(interlaced))
        try:
            kept = png_data.stored((part[8:-4] for part in pixels), rows)
        except ValueError as error:
            raise undecodable(str(error)) from None
        if kept is not None:
            pixels = [kept]
    return Header("PNG", width, height, _png_orientation(profiles), b"".join([*before, *pixels, *after]))


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """A PNG's chunks, each with its type: a length, the type, so many bytes and a checksum, up to IEND (PNG, 5.3)."""
    place = len(_PNG)
    for _ in range(_MAX_CHUNKS):
        if place + 12 > len(data):
            raise undecodable()
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if end > len(data):
            raise undecodable("a chunk of the PNG is longer than what is left of it")
        yield kind, data[place:end]
        if kind == b"IEND":
            return
        place = end
    raise undecodable(f"the PNG has more than {_MAX_CHUNKS} chunks")


def _png_orientation(profiles: list[bytes]) -> int:
    small = [profile for profile in profiles if len(profile) <= _MAX_PROFILE_BYTES]
    return _orientation(_PIXEL[:_PIXEL_DATA] + b"".join(small) + _PIXEL[_PIXEL_DATA:]) if small else 1


def _jpeg(data: bytes, limits: Limits) -> Header:
    """A marker is 0xff and its kind; of most, a length and so many bytes follow (ITU-T T.81, annex B).

    Between them are the scans' data. What is not a marker is passed over, as libjpeg does.
    """
    frame = b""
    profiles: dict[bytes, bytes] = {}
    place = len(_JPEG) - 1
    segments = scans = 0
    while found := _MARKER.search(data, place):
        place = found.end()
        kind = data[place - 1]
        if kind == _EOI:
            break
        if kind == _TEM:
            continue
        (length,) = struct.unpack_from(">H", data, place) if place + 2 <= len(data) else (0,)
        if length < 2 or place + length > len(data):
            raise undecodable()
        if kind < _FIRST_FRAME or kind == _SOI:
            raise undecodable("the JPEG has a marker that none has")
        segments += 1
        scans += kind == _SOS
        if segments > _MAX_SEGMENTS or scans > _MAX_SCANS:
            raise undecodable(f"the JPEG has more than {_MAX_SEGMENTS} segments or {_MAX_SCANS} scans")
        if kind in _FRAMES and not frame:
            frame = data[place - 2 : place + length]
        elif kind == _APP1 and not scans:
            for start in _JPEG_PROFILES:
                if data.startswith(start, place + 2):
                    profiles.setdefault(start, data[place - 2 : place + length])
        place += length
    if len(frame) < 10:
        raise undecodable(_BROKEN)
    height, width = struct.unpack_from(">HH", frame, 5)
    _check_size(width, height, limits)
    orientation = _orientation(_JPEG[:2] + b"".join(profiles.values()) + frame + b"\xff\xda\0\2") if profiles else 1
    return Header("JPEG", width, height, orientation, data)


def _gif(data: bytes, limits: Limits) -> Header:
    """Pillow takes what comes before the first frame one block at a time; few have more than a handful (GIF89a, 15)."""
    place = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0)
    blocks = 0
    while data[place : place + 1] == b"!":
        place += 2
        while True:
            blocks += 1
            if blocks > _GIF_BLOCKS:
                raise undecodable(f"the GIF has more than {_GIF_BLOCKS} blocks before its first frame")
            if place >= len(data):
                raise undecodable()
            size = data[place]
            place += 1 + size
            if not size:
                break
    if data[place : place + 1] != b",":
        raise undecodable("the GIF has no frame, or its header is broken")
    return _by_pillow("GIF", data, limits)


def _webp(data: bytes, limits: Limits) -> Header:
    return _by_pillow("WEBP", data, limits)


def _bmp(data: bytes, limits: Limits) -> Header:
    """OpenCV takes bit fields to be as they mostly are, and does not spread 5 bits to 8."""
    (header_bytes,) = struct.unpack_from("<I", data, 14) if len(data) >= 18 else (0,)
    odd = False
    if header_bytes == 12 and len(data) >= 26:
        odd = data[24] == 16
    elif len(data) >= 34:
        bits, compression = struct.unpack_from("<HI", data, 28)
        odd = bits == 16 or compression == _BMP_BITFIELDS
    return _by_pillow("BMP", data, limits, odd)


def _by_pillow(form: str, data: bytes, limits: Limits, decoded_so: bool = False) -> Header:
    try:
        with Image.open(io.BytesIO(data), formats=[form]) as image:
            width, height = image.size
            # Before its EXIF is read, for which Pillow may decode.
            _check_size(width, height, limits)
            orientation = _orientation_of(image)
    except InvalidArgument:
        raise
    except Image.DecompressionBombError:
        raise InvalidArgument("the image has far too many pixels") from None
    except Exception:
        raise undecodable(_ODD) from None
    return Header(form, width, height, orientation, data, decoded_so)


def _orientation(stand_in: bytes) -> int:
    """That of an image which was made to hold an image's profiles, and nothing else that takes time."""
    try:
        with Image.open(io.BytesIO(stand_in), formats=["PNG", "JPEG"]) as image:
            return _orientation_of(image)
    except Exception:
        return 1


def _orientation_of(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


_PIXEL_HEADER = _PNG + png_data.chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
_PIXEL = _PIXEL_HEADER + png_data.chunk(b"IDAT", zlib.compress(b"\0\0")) + png_data.chunk(b"IEND", b"")
_PIXEL_DATA = len(_PIXEL_HEADER)
_STARTS = ((_JPEG, "JPEG"), (_PNG, "PNG"), (b"RIFF", "WEBP"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF"), (b"BM", "BMP"))
_READERS: dict[str, Callable[[bytes, Limits], Header]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "BMP": _bmp,
    "WEBP": _webp,
    "GIF": _gif,
}
# What Pillow would say of an image on standard error (too large, odd EXIF) is ours to say, or does not matter.
warnings.filterwarnings("ignore", module=r"PIL\.")
