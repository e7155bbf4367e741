"""Images made to cost a decoder much memory or time are refused, or decoded cheaply."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from PIL import Image

from atserving.errors import InvalidArgument
from evaluator.images import decode
from evaluator.limits import Limits
from tests.evaluator.images.measured_decoder import MeasuredDecoder, started
from tests.evaluator.images.raw_images import (
    BLACK,
    SIDE,
    chunk,
    jpeg,
    jpeg_of_scans,
    noise,
    png,
    png_rows_bytes,
    segment,
    zlib_zeros,
)

LIMITS = Limits()
TOO_MUCH_DATA = "the image can't be decoded: the PNG has far more data than pixels"
TOO_MANY_SEGMENTS = "more than 1000 segments or 50 scans"


@pytest.fixture(scope="module")
def decoder() -> Iterator[MeasuredDecoder]:
    with started() as decoder:
        yield decoder


@pytest.mark.parametrize("claimed", [0x10000000, 0x7FFFFFFF, 0xFFFFFFE0, 0xFFFFFFFF])
@pytest.mark.parametrize("kind", [b"IDAT", b"tEXt", b"iCCP"])
def test_png_chunk_longer_than_the_data_is_refused(decoder: MeasuredDecoder, kind: bytes, claimed: int) -> None:
    answer = decoder.decode(png(struct.pack(">I", claimed) + kind + bytes(20)))
    assert answer == "the image can't be decoded: a PNG chunk is longer than the rest of the image's data"


def test_png_with_far_more_data_than_pixels_is_refused(decoder: MeasuredDecoder) -> None:
    assert decoder.decode(png(chunk(b"IDAT", zlib_zeros(300)))) == TOO_MUCH_DATA


def test_png_that_is_too_small_to_check_is_cheap_however_much_it_unpacks_to(decoder: MeasuredDecoder) -> None:
    data = chunk(b"IDAT", zlib_zeros(7))
    assert len(data) < 1 << 17
    # The most that is unpacked without a check takes as long as an ordinary, large image.
    assert decoder.decode(png(data, width=224, height=224)) == "(224, 224, 3)"


@pytest.mark.parametrize("side", [1, 8, 64, 200])
def test_png_data_larger_than_its_rows_is_checked(decoder: MeasuredDecoder, side: int) -> None:
    data = chunk(b"IDAT", zlib_zeros(8))
    assert decoder.decode(png(data, width=side, height=side)) == TOO_MUCH_DATA


@pytest.mark.parametrize("side", [1, 8, 64, 300])
def test_png_that_can_not_be_compressed_is_decoded(side: int) -> None:
    rows = np.hstack([np.zeros((side, 1), np.uint8), noise(side, side).reshape(side, -1)])
    for level in range(10):
        data = chunk(b"IDAT", zlib.compress(rows.tobytes(), level))
        assert (decode(png(data, width=side, height=side), LIMITS)[:, :, ::-1] == noise(side, side)).all()


def test_largest_png_with_far_more_data_than_pixels_is_refused(decoder: MeasuredDecoder) -> None:
    largest = png(chunk(b"IDAT", zlib_zeros(300)), width=4999, height=4999, depth=16, colour=6, interlaced=True)
    assert decoder.decode(largest) == TOO_MUCH_DATA


@pytest.mark.parametrize(("width", "height"), [(5, 3), (1, 1), (8, 8), (13, 11)])
@pytest.mark.parametrize("interlaced", [False, True])
def test_png_needs_exactly_the_bytes_of_its_rows(width: int, height: int, interlaced: bool) -> None:
    def with_rows(count: int) -> bytes:
        data = chunk(b"IDAT", zlib.compress(bytes(count)))
        return png(data, width=width, height=height, interlaced=interlaced)

    rows_bytes = png_rows_bytes(width, height, 24, interlaced)
    assert decode(with_rows(rows_bytes), LIMITS).shape == (height, width, 3)
    with pytest.raises(InvalidArgument, match="broken or cut short"):
        decode(with_rows(rows_bytes - 1), LIMITS)


@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind the pixels"])
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_png_text_and_profiles_are_not_unpacked(decoder: MeasuredDecoder, kind: bytes, behind: bool) -> None:
    start = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[kind]
    bombs = chunk(kind, start + zlib.compress(bytes(1 << 20), 9)) * 9000
    chunks = (BLACK, bombs) if behind else (bombs, BLACK)
    assert decoder.decode(png(*chunks), max_ratio=2) == "(64, 64, 3)"


@pytest.mark.parametrize("kind", [b"teSt", b"tEXt", b"IDAT", b"fdAT"])
def test_png_of_more_than_10000_chunks_is_refused(kind: bytes) -> None:
    with pytest.raises(InvalidArgument, match="the PNG has more than 10000 chunks"):
        decode(png(chunk(kind, b"") * 10_000, BLACK), LIMITS)
    assert decode(png(chunk(kind, b"") * 9_900, BLACK), LIMITS).shape == (SIDE, SIDE, 3)


def test_png_must_begin_with_its_header() -> None:
    whole = png(BLACK)
    for data in (whole[:8] + BLACK + whole[8:], whole[:8] + chunk(b"IHDR", bytes(12)) + BLACK, whole[:20]):
        with pytest.raises(InvalidArgument, match="the PNG does not begin with its header"):
            decode(data, LIMITS)


def test_png_must_end_with_its_last_chunk() -> None:
    whole = png(BLACK)
    for cut in (1, 11, 12):
        with pytest.raises(InvalidArgument, match="the image can't be decoded"):
            decode(whole[:-cut], LIMITS)
    assert (decode(whole + b"PK and more", LIMITS) == 0).all()


def test_jpeg_of_more_than_50_scans_is_refused(decoder: MeasuredDecoder) -> None:
    with pytest.raises(InvalidArgument, match=TOO_MANY_SEGMENTS):
        decode(jpeg_of_scans(SIDE, 51), LIMITS)
    assert TOO_MANY_SEGMENTS in decoder.decode(jpeg_of_scans(4992, 2000))
    assert decoder.decode(jpeg_of_scans(4992, 50)) == "(4992, 4992, 3)"


@pytest.mark.parametrize(
    "false_end", [segment(0xFE, b"\xff\xd9"), segment(0xE1, b"\xff\xd8\xff\xd9"), b"\xff\xd3", b"\xff" * 9 + b"\xd3"]
)
def test_scans_are_counted_beyond_bytes_that_look_like_an_end(false_end: bytes) -> None:
    scans = jpeg_of_scans(SIDE, 51)
    first = scans.index(b"\xff\xda")
    with pytest.raises(InvalidArgument, match=TOO_MANY_SEGMENTS):
        decode(scans[:first] + false_end + scans[first:], LIMITS)


def test_images_behind_the_end_of_a_jpeg_are_ignored() -> None:
    assert decode(jpeg() + jpeg_of_scans(SIDE, 51), LIMITS).shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("kind", [0xC4, 0xE1, 0xE9, 0xFE])
def test_jpeg_of_more_than_1000_segments_is_refused(kind: int) -> None:
    with pytest.raises(InvalidArgument, match=TOO_MANY_SEGMENTS):
        decode(jpeg(segment(kind, b"") * 1000), LIMITS)
    assert decode(jpeg(segment(kind, b"") * 900), LIMITS).shape == (SIDE, SIDE, 3)


def test_only_the_first_exif_of_a_jpeg_is_read(decoder: MeasuredDecoder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    first = segment(0xE1, exif.tobytes())
    wide = cv2.imencode(".jpg", noise(SIDE, 2 * SIDE))[1].tobytes()
    data = wide[:2] + first + segment(0xE1, b"Exif\0\0" + bytes(10_000)) * 900 + wide[2:]
    assert decoder.decode(data) == "(128, 64, 3)"


def test_jpeg_of_very_many_exifs_is_refused(decoder: MeasuredDecoder) -> None:
    data = jpeg(segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 16, segment(0xE1, b"Exif\0\0x") * 200_000)
    assert TOO_MANY_SEGMENTS in decoder.decode(data)


def test_jpeg_may_have_fill_bytes(decoder: MeasuredDecoder) -> None:
    plain = jpeg()
    assert decoder.decode(plain[:2] + b"\xff" * 10_000_000 + plain[2:]) == "(64, 64, 3)"
    assert (decode(plain[:2] + b"\xff" * 1000 + plain[2:], LIMITS) == decode(plain, LIMITS)).all()


def test_jpeg_segment_longer_than_the_data_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="broken or cut short"):
        decode(jpeg()[:-2] + b"\xff\xfe\xff\xff\xff\xd9", LIMITS)


def test_jpeg_with_an_invalid_marker_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="an invalid marker"):
        decode(jpeg(segment(0x30, b"")), LIMITS)


@pytest.mark.parametrize("blocks", [b"\x21\xfe" + b"\x01x" * 20_000 + b"\0", b"\x21\xfe\0" * 20_000])
def test_gif_of_more_than_10000_blocks_is_refused(blocks: bytes) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(SIDE, SIDE)).quantize(256).save(buffer, "GIF")
    plain = buffer.getvalue()
    frame = 13 + 3 * 256
    assert plain[10] & 0x87 == 0x87
    with pytest.raises(InvalidArgument, match="the GIF has more than 10000 blocks before its first frame"):
        decode(plain[:frame] + blocks + plain[frame:], LIMITS)
    few = plain[:frame] + b"\x21\xfe\x05hello\0" * 100 + plain[frame:]
    assert (decode(few, LIMITS) == decode(plain, LIMITS)).all()
