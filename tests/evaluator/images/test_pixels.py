"""The checks on an image's header do not change its pixels: they are those that OpenCV decodes from all its bytes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from PIL import Image

from atserving.errors import InvalidArgument
from evaluator.images import Pixels, decode
from evaluator.limits import Limits
from tests.evaluator.images.raw_images import PNG_SAMPLES, SIDE, bmp, chunk, noise, png, png_rows_bytes

LIMITS = Limits()
PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def by_opencv(data: bytes) -> Pixels:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    assert pixels is not None
    return pixels.astype(np.uint8, copy=False)


@pytest.mark.parametrize(
    ("colour", "depth"), [(colour, depth) for colour in PNG_DEPTHS for depth in PNG_DEPTHS[colour]]
)
@pytest.mark.parametrize("interlaced", [False, True])
def test_png_pixels_do_not_depend_on_ancillary_chunks(colour: int, depth: int, interlaced: bool) -> None:
    random = np.random.default_rng(1)
    count = png_rows_bytes(SIDE, SIDE, depth * PNG_SAMPLES[colour], interlaced)
    # Filters are 0 to 4, so all bytes are: some of them are filters.
    pixels = chunk(b"IDAT", zlib.compress(random.integers(0, 5, count, np.uint8).tobytes()))
    palette = chunk(b"PLTE", random.bytes(3 << depth)) if colour == 3 else b""
    samples = 1 if colour in (0, 4) else 3
    transparencies = {0: b"\0\1", 2: b"\0\1" * 3, 3: b"\0\x80"}
    before = [
        chunk(b"gAMA", struct.pack(">I", 100_000)),
        chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)),
        chunk(b"sBIT", bytes([max(1, min(depth, 8) - 2)] * (3 if colour == 3 else PNG_SAMPLES[colour]))),
        chunk(b"tEXt", b"a\0b"),
    ]
    background = chunk(b"bKGD", b"\0" if colour == 3 else b"\0\1" * samples)
    transparency = [chunk(b"tRNS", transparencies[colour])] if colour in transparencies else []
    chunks = (*before, palette, *transparency, background, pixels)
    data = png(*chunks, depth=depth, colour=colour, interlaced=interlaced)
    assert (decode(data, LIMITS) == by_opencv(data)).all()


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
    ("side", "depth", "colour"),
    [(700, 8, 2), (500, 16, 6), (1500, 8, 0), pytest.param(4999, 8, 2, id="rows too large to keep unpacked")],
)
def test_png_pixels_survive_the_check_of_large_data(side: int, depth: int, colour: int, interlaced: bool) -> None:
    count = png_rows_bytes(side, side, depth * PNG_SAMPLES[colour], interlaced)
    rows = np.zeros(count, np.uint8)
    # Filters are 0 to 4, so all bytes are. Such data compresses to a third.
    rows[: 2 << 20] = np.random.default_rng(1).integers(0, 5, min(count, 2 << 20), np.uint8)
    packed = zlib.compress(rows.tobytes(), 1)
    parts = [chunk(b"IDAT", packed[start : start + 50_000]) for start in range(0, len(packed), 50_000)]
    data = png(*parts, width=side, height=side, depth=depth, colour=colour, interlaced=interlaced)
    assert len(packed) > 1 << 19
    assert (decode(data, LIMITS) == by_opencv(data)).all()


def test_an_encoders_large_png_keeps_its_pixels() -> None:
    data: bytes = cv2.imencode(".png", noise(700, 700))[1].tobytes()
    assert len(data) > 1 << 20
    assert (decode(data, LIMITS) == noise(700, 700)).all()


@pytest.mark.parametrize("where", [0.01, 0.5, 0.999])
def test_damaged_large_png_is_refused(where: float) -> None:
    data = bytearray(cv2.imencode(".png", noise(700, 700))[1].tobytes())
    assert len(data) > 1 << 20
    data[int(len(data) * where)] ^= 0x55
    with pytest.raises(InvalidArgument, match="broken or cut short"):
        decode(bytes(data), LIMITS)


def saved(form: str, **options: object) -> Callable[[], bytes]:
    def save() -> bytes:
        buffer = io.BytesIO()
        image = Image.fromarray(cv2.GaussianBlur(noise(90, 120), (9, 9), 3))
        image.save(buffer, form, **options)
        return buffer.getvalue()

    return save


@pytest.mark.parametrize(
    "save",
    [
        pytest.param(saved("JPEG"), id="jpeg"),
        pytest.param(saved("JPEG", progressive=True), id="progressive jpeg"),
        pytest.param(saved("JPEG", restart_marker_rows=1, comment=b"\xff\xd9"), id="jpeg with restarts"),
        pytest.param(saved("PNG"), id="png"),
        pytest.param(saved("PNG", dpi=(72, 72)), id="png with dpi"),
        pytest.param(saved("WEBP"), id="webp"),
        pytest.param(saved("GIF"), id="gif"),
        pytest.param(saved("BMP"), id="bmp"),
    ],
)
def test_ordinary_images_have_opencvs_pixels(save: Callable[[], bytes]) -> None:
    assert (decode(save(), LIMITS) == by_opencv(save())).all()


@pytest.mark.parametrize("header_bytes", [40, 108])
@pytest.mark.parametrize(
    ("bits", "masks", "values"),
    [
        (16, (0xF800, 0x07E0, 0x001F), [0xF800, 0x07E0, 0x001F, 0xFFFF]),
        (16, (0x7C00, 0x03E0, 0x001F), [0x7C00, 0x03E0, 0x001F, 0x7FFF]),
        (32, (0xFF0000, 0xFF00, 0xFF), [0xFF0000, 0xFF00, 0xFF, 0xFFFFFF]),
        (32, (0xFF000000, 0xFF0000, 0xFF00), [0xFF000000, 0xFF0000, 0xFF00, 0xFFFFFF00]),
    ],
)
def test_bmp_masks_are_applied(bits: int, masks: tuple[int, ...], values: list[int], header_bytes: int) -> None:
    data = struct.pack("<4" + ("H" if bits == 16 else "I"), *values)
    pixels = decode(bmp(4, bits, data, masks, header_bytes), LIMITS)
    assert pixels.flags["C_CONTIGUOUS"]
    assert pixels.tolist() == [[[0, 0, 255], [0, 255, 0], [255, 0, 0], [255, 255, 255]]]


def test_five_bits_of_a_bmp_are_scaled_to_eight() -> None:
    data = struct.pack("<4H", 0x7C00, 0x7FFF, 0x0010, 0)
    assert decode(bmp(4, 16, data), LIMITS).tolist() == [[[0, 0, 255], [255, 255, 255], [131, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(
            bmp(2, 32, bytes(8), (0x3FF00000, 0xFFC00, 0x3FF)),
            "its header is broken, or its variant of the format is not supported",
            id="masks of ten bits",
        ),
        pytest.param(
            bmp(400, 16, bytes(200), (0xF800, 0x07E0, 0x001F)), "its data is broken or cut short", id="cut short"
        ),
        pytest.param(
            bmp(6000, 16, bytes(12_000), (0xF800, 0x07E0, 0x001F)), "6000x1 pixels, more than 4999x4999", id="too wide"
        ),
    ],
)
def test_bmp_with_bit_fields_is_checked_too(data: bytes, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        decode(data, LIMITS)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "WEBP", "GIF"])
def test_image_that_is_cut_short_is_still_recognised(form: str) -> None:
    data = saved(form)()
    for end in range(16, len(data) - 2, max(1, len(data) // 40)):
        with pytest.raises(InvalidArgument, match="the image can't be decoded") as caught:
            decode(data[:end], LIMITS)
        assert "not a JPEG" not in str(caught.value)
