"""A WebP is decoded as OpenCV decodes it, whatever it contains beside its first frame."""

from __future__ import annotations

import io
import struct
from contextlib import suppress
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from atserving.errors import InvalidArgument
from evaluator.images import decode
from evaluator.images.webp import read_header
from evaluator.limits import Limits
from tests.evaluator.images.raw_images import SIDE, noise

LIMITS = Limits()
EXIF = Image.Exif()
EXIF[0x0112] = 6
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def saved(mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(SIDE, SIDE // 2)).convert(mode).save(buffer, "WEBP", **options)
    return buffer.getvalue()


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks]
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def by_opencv(data: bytes) -> Any:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)


OTHERS = [Image.new("RGB", (SIDE // 2, SIDE), color) for color in ("red", "blue")]
WEBPS = {
    "lossy": saved(),
    "lossless": saved(lossless=True),
    "transparent": saved("RGBA"),
    "transparent lossless": saved("RGBA", lossless=True),
    "with profiles": saved(icc_profile=bytes(1000), exif=EXIF, xmp=XMP),
    "animated": saved(save_all=True, append_images=OTHERS, duration=100, exif=EXIF),
}


@pytest.mark.parametrize("name", WEBPS)
def test_pixels_are_those_of_opencv(name: str) -> None:
    header = read_header(WEBPS[name], LIMITS)
    assert (header.width, header.height) == (SIDE // 2, SIDE)
    assert (by_opencv(header.data) == by_opencv(WEBPS[name])).all()


@pytest.mark.parametrize("name", ["with profiles", "animated"])
def test_decoder_gets_neither_profiles_nor_further_frames(name: str) -> None:
    data = read_header(WEBPS[name], LIMITS).data
    assert not any(kind in data for kind in (b"ICCP", b"EXIF", b"XMP "))
    assert data.count(b"ANMF") == (name == "animated")


@pytest.mark.parametrize("options", [{"exif": EXIF}, {"xmp": XMP}, {"exif": b"Exif\0\0" + EXIF.tobytes()[6:]}])
def test_orientation_may_be_in_either_profile(options: dict[str, Any]) -> None:
    assert read_header(saved(**options), LIMITS).orientation == 6
    assert decode(saved(**options), LIMITS).shape == (SIDE // 2, SIDE, 3)


def test_webp_of_more_than_10000_chunks_is_refused() -> None:
    frame = (b"VP8 ", WEBPS["lossy"][20:])
    with pytest.raises(InvalidArgument, match="the WebP has more than 10000 chunks"):
        decode(riff(frame, *[(b"junk", b"")] * 10_000), LIMITS)
    assert (decode(riff(frame, *[(b"junk", b"x")] * 9000), LIMITS) == decode(WEBPS["lossy"], LIMITS)).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (riff((b"VP8X", struct.pack("<I", 0) + b"\x87\x13\0\0\0\0")), "the image is 5000x1 pixels"),
        (riff((b"VP8L", b"\x2f" + struct.pack("<I", 4999 << 14))), "the image is 1x5000 pixels"),
        (riff((b"VP8 ", bytes(3) + b"\x9d\x01\x2a" + struct.pack("<HH", 5000, 1))), "the image is 5000x1 pixels"),
        (riff((b"VP8X", bytes(10)), (b"EXIF", b"")), "broken or cut short"),
        (riff((b"EXIF", b"")), "broken or cut short"),
        (riff(), "broken or cut short"),
    ],
)
def test_malformed_or_too_large_webp_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        decode(data, LIMITS)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_damaged_webp_gives_pixels_or_an_error(data: st.DataObject) -> None:
    damaged = bytearray(WEBPS[data.draw(st.sampled_from(sorted(WEBPS)))])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(12, min(len(damaged) - 1, 80)))] = data.draw(st.integers(0, 255))
    with suppress(InvalidArgument):
        assert decode(bytes(damaged[: data.draw(st.integers(20, len(damaged)))]), LIMITS).ndim == 3
