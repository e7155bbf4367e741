"""Images: what is decoded, how, and what is refused before and after a look at the pixels."""

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile

from atserving.errors import InvalidArgument, StartError
from evaluator.images import Pixels, decode, read
from evaluator.limits import Limits

LIMITS = Limits()
WIDTH, HEIGHT = 48, 32


def picture() -> Image.Image:
    """Smooth, so that lossy formats come close, and different in each corner and channel."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    planes = [x * 5, y * 7, 255 - x * 2 - y * 3]
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def encoded(form: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture().convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def bgr(image: Image.Image) -> Pixels:
    return np.asarray(image.convert("RGB"))[:, :, ::-1]


def difference(pixels: Pixels, expected: Pixels) -> float:
    assert pixels.shape == expected.shape
    return float(np.abs(pixels.astype(int) - expected).mean())


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        pytest.param(encoded("JPEG", quality=95), 3, id="jpeg"),
        pytest.param(encoded("JPEG", quality=95, progressive=True), 3, id="progressive jpeg"),
        pytest.param(encoded("JPEG", "CMYK", quality=95), 4, id="cmyk jpeg"),
        pytest.param(encoded("PNG"), 0, id="png"),
        pytest.param(encoded("PNG", "P"), 60, id="palette png"),
        pytest.param(encoded("PNG", "RGBA"), 0, id="png with alpha"),
        pytest.param(encoded("BMP"), 0, id="bmp"),
        pytest.param(encoded("WEBP", lossless=True), 0, id="webp"),
        pytest.param(encoded("WEBP", "RGBA", lossless=True), 0, id="webp with alpha"),
        pytest.param(encoded("GIF"), 60, id="gif"),
    ],
)
def test_formats_are_decoded_to_bgr(data: bytes, tolerance: float) -> None:
    pixels = decode(data, LIMITS)
    assert pixels.dtype == np.uint8
    assert pixels.flags["C_CONTIGUOUS"]
    assert difference(pixels, bgr(picture())) <= tolerance
    # As another decoder sees the same bytes, palettes and all.
    assert difference(pixels, bgr(Image.open(io.BytesIO(data)))) <= 2


@pytest.mark.parametrize(
    ("mode", "form", "options"),
    [
        ("1", "PNG", {}),
        ("1", "BMP", {}),
        ("L", "PNG", {}),
        ("L", "BMP", {}),
        ("L", "GIF", {}),
        ("LA", "PNG", {}),
        ("P", "BMP", {}),
        ("P", "PNG", {"transparency": 3}),
        ("P", "GIF", {"transparency": 3}),
        ("RGBA", "BMP", {}),
        ("RGB", "PNG", {"interlace": 1}),
        ("RGB", "JPEG", {"quality": 95, "subsampling": 2}),
        ("RGB", "JPEG", {"quality": 95, "restart_marker_rows": 1}),
    ],
    ids=str,
)
def test_every_kind_of_samples_is_decoded(mode: str, form: str, options: dict[str, Any]) -> None:
    data = encoded(form, mode, **options)
    # Transparent pixels have a colour too; another decoder's, once transparency is set aside.
    image = Image.open(io.BytesIO(data))
    image.info.pop("transparency", None)
    assert difference(decode(data, LIMITS), bgr(image)) <= 2


def test_cmyk_as_adobe_writes_it_is_not_inverted() -> None:
    data = encoded("JPEG", "CMYK", quality=95)
    assert b"Adobe" in data[:200]
    dark, light = decode(data, LIMITS)[0, 0], decode(data, LIMITS)[0, -1]
    assert (bgr(picture())[0, 0].astype(int) - dark).max() < 20
    assert np.abs(bgr(picture())[0, -1].astype(int) - light).max() < 20


def test_sixteen_bits_of_colour_keep_their_high_byte() -> None:
    deep = np.random.default_rng(1).integers(0, 65535, (HEIGHT, WIDTH, 4), np.uint16)
    for channels in (3, 4):
        pixels = decode(cv2.imencode(".png", deep[:, :, :channels])[1].tobytes(), LIMITS)
        assert (pixels == deep[:, :, :3] >> 8).all()


def test_a_first_frame_that_is_smaller_than_its_canvas_is_put_on_it() -> None:
    data = bytearray(encoded("GIF"))
    # The canvas, of which the frame covers the top left.
    data[6:10] = struct.pack("<HH", WIDTH + 10, HEIGHT + 5)
    pixels = decode(bytes(data), LIMITS)
    assert pixels.shape == (HEIGHT + 5, WIDTH + 10, 3)
    assert difference(pixels[:HEIGHT, :WIDTH], bgr(Image.open(io.BytesIO(encoded("GIF"))))) <= 2


def test_grey_becomes_three_equal_channels() -> None:
    pixels = decode(encoded("JPEG", "L"), LIMITS)
    assert (pixels[:, :, 0] == pixels[:, :, 2]).all()


def test_sixteen_bits_keep_their_high_byte() -> None:
    deep = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 42).astype(np.uint16)
    pixels = decode(cv2.imencode(".png", deep)[1].tobytes(), LIMITS)
    assert (pixels[:, :, 0] == deep >> 8).all()


def test_alpha_is_dropped_not_blended() -> None:
    image = picture()
    image.putalpha(0)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert (decode(buffer.getvalue(), LIMITS) == bgr(picture())).all()


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken(form: str) -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "blue", "green")]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
    assert difference(decode(buffer.getvalue(), LIMITS), bgr(frames[0])) <= 2


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(form: str, orientation: int) -> None:
    # What each orientation asks of a viewer, by Pillow's names.
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {"quality": 95}
    upright = picture().transpose(turns[orientation]) if orientation in turns else picture()
    pixels = decode(encoded(form, exif=exif, **options), LIMITS)
    assert pixels.flags["C_CONTIGUOUS"]
    assert difference(pixels, bgr(upright)) <= 3


def test_a_png_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("Pillow decodes too"))
    assert decode(encoded("PNG"), LIMITS).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("kind", [b"eXIf", b"iTXt"])
def test_a_png_may_have_its_orientation_behind_its_pixels(kind: bytes) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x:xmpmeta xmlns:tiff="t" tiff:Orientation="6"/>'
    payload = exif.tobytes()[6:] if kind == b"eXIf" else xmp
    plain = encoded("PNG")
    end = plain.rindex(b"IEND") - 4
    data = plain[:end] + png_chunk(kind, payload) + plain[end:]
    assert (decode(data, LIMITS) == bgr(picture().transpose(Image.Transpose.ROTATE_270))).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_says_nothing() -> None:
    assert decode(encoded("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), LIMITS).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "WEBP", "GIF"])
def test_an_image_that_is_cut_short_is_refused(form: str, share: float) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 255, (300, 400, 3), np.uint8)
    Image.fromarray(noise).save(buffer, form)
    data = buffer.getvalue()
    with pytest.raises(InvalidArgument, match="the image can't be decoded"):
        decode(data[: int(len(data) * share)], LIMITS)


@pytest.mark.parametrize("form", ["TIFF", "PPM", "ICO", "TGA", "JPEG2000"])
def test_other_formats_are_refused(form: str) -> None:
    with pytest.raises(InvalidArgument, match="not a JPEG, PNG, BMP, WebP or GIF"):
        decode(encoded(form), LIMITS)


@pytest.mark.parametrize("data", [b"", b"x", b"\xff\xd8\xff", b"GIF89a", b"<svg/>" * 100, bytes(1000)])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgument, match="the image can't be decoded"):
        decode(data, LIMITS)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int) -> bytes:
    """A well-formed PNG of a few bytes whose header claims a size."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(5000, 10), (10, 5000), (20000, 20000), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_from_the_header_alone(width: int, height: int) -> None:
    with pytest.raises(InvalidArgument, match=r"more than 4999x4999|far too many pixels"):
        decode(png_claiming(width, height), LIMITS)


def test_a_bomb_within_the_bytes_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = cv2.imencode(".png", np.zeros((6000, 6000, 3), np.uint8))[1].tobytes()
    assert len(bomb) < 300_000
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("was decoded"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("was decoded"))
    with pytest.raises(InvalidArgument, match="6000x6000 pixels, more than 4999x4999"):
        decode(bomb, LIMITS)


def test_the_limits_are_inclusive_and_are_the_images_not_the_turned_ones() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded("JPEG", exif=exif)
    assert decode(data, Limits(len(data), WIDTH, HEIGHT)).shape == (WIDTH, HEIGHT, 3)
    for limits in (Limits(len(data) - 1), Limits(max_width=WIDTH - 1), Limits(max_height=HEIGHT - 1)):
        with pytest.raises(InvalidArgument, match=r"larger than|more than"):
            decode(data, limits)


def test_a_type_that_lies_is_no_matter_only_the_bytes_count() -> None:
    jpeg = encoded("JPEG")
    with pytest.raises(InvalidArgument):
        decode(b"\x89PNG\r\n\x1a\n" + jpeg, LIMITS)
    with pytest.raises(InvalidArgument):
        decode(b"RIFF" + jpeg, LIMITS)


def test_limits_come_from_the_release() -> None:
    limits = Limits.of_release({"max_bytes": 1000, "max_width": 20})
    assert limits == Limits(1000, 20, 4999)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "10", None])
def test_wrong_limits_stop_the_start(value: object) -> None:
    with pytest.raises(StartError, match=r"custom_values\.max_bytes is .*, should be a positive integer"):
        Limits.of_release({"max_bytes": value})


def large(form: str, width: int, height: int, orientation: int = 1) -> bytes:
    """The picture, enlarged."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture().resize((width, height), Image.Resampling.BICUBIC).save(buffer, form, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("size", "least", "expected"),
    [
        ((640, 480), (640, 480), (640, 480)),
        ((640, 480), (321, 100), (640, 480)),
        ((640, 480), (320, 240), (320, 240)),
        ((640, 480), (320, 241), (640, 480)),
        ((640, 480), (224, 224), (320, 240)),
        ((640, 480), (28, 28), (80, 60)),
        ((640, 480), (1, 1), (80, 60)),
        ((639, 479), (320, 240), (320, 240)),
        ((641, 481), (81, 61), (81, 61)),
        ((4000, 100), (20, 60), (4000, 100)),
        ((16, 16), (28, 28), (16, 16)),
    ],
)
def test_a_jpeg_is_decoded_smaller_but_never_below_what_is_needed(
    size: tuple[int, int], least: tuple[int, int], expected: tuple[int, int]
) -> None:
    read_smaller = read(large("JPEG", *size), LIMITS, least)
    assert (read_smaller.pixels.shape, read_smaller.size) == ((expected[1], expected[0], 3), size)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_smaller_jpeg_is_upright_too_and_knows_its_whole_size(orientation: int) -> None:
    data = large("JPEG", 640, 240, orientation)
    whole = decode(data, LIMITS)
    height, width = whole.shape[:2]
    # A quarter is enough where it lies, only a half where it stands.
    smaller = read(data, LIMITS, (100, 60))
    assert smaller.size == (width, height)
    assert smaller.pixels.shape[:2] == ((60, 160) if orientation < 5 else (320, 120))
    shown = cv2.resize(whole, smaller.pixels.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert difference(smaller.pixels, shown.astype(np.uint8)) < 2


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_what_is_no_jpeg_is_decoded_whole(form: str) -> None:
    assert read(large(form, 640, 480), LIMITS, (28, 28)).pixels.shape == (480, 640, 3)


def test_limits_are_those_of_the_whole_image() -> None:
    with pytest.raises(InvalidArgument, match="640x480 pixels, more than 639x4999"):
        read(large("JPEG", 640, 480), Limits(max_width=639), (28, 28))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_smaller_jpeg_that_is_cut_short_is_refused(share: float) -> None:
    data = large("JPEG", 640, 480)
    with pytest.raises(InvalidArgument, match="its data is broken or cut short"):
        read(data[: int(len(data) * share)], LIMITS, (80, 60))


def test_a_jpeg_is_whole_unless_it_may_be_smaller() -> None:
    data = large("JPEG", 640, 480)
    np.testing.assert_array_equal(read(data, LIMITS).pixels, decode(data, LIMITS))
    assert decode(data, LIMITS).shape == (480, 640, 3)
