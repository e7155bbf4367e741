"""Images of all formats decode to upright BGR; malformed and too large ones are refused."""

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile

from atserving.errors import InvalidArgument, StartError
from evaluator.images import Pixels, decode
from evaluator.limits import Limits
from evaluator.options import Options
from tests.evaluator.images.raw_images import chunk, png

LIMITS = Limits()
WIDTH, HEIGHT = 48, 32


def picture() -> Image.Image:
    """Return a smooth image, which lossy formats keep well, with different corners and channels."""
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
def test_all_formats_decode_to_bgr(data: bytes, tolerance: float) -> None:
    pixels = decode(data, LIMITS)
    assert pixels.dtype == np.uint8
    assert pixels.flags["C_CONTIGUOUS"]
    assert difference(pixels, bgr(picture())) <= tolerance
    # Pillow decodes the same bytes to the same pixels, also those of a palette.
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
def test_all_sample_formats_are_decoded(mode: str, form: str, options: dict[str, Any]) -> None:
    data = encoded(form, mode, **options)
    # Pillow gives transparent pixels their colour once it ignores the transparency.
    image = Image.open(io.BytesIO(data))
    image.info.pop("transparency", None)
    assert difference(decode(data, LIMITS), bgr(image)) <= 2


def test_adobe_cmyk_is_not_inverted() -> None:
    data = encoded("JPEG", "CMYK", quality=95)
    assert b"Adobe" in data[:200]
    dark, light = decode(data, LIMITS)[0, 0], decode(data, LIMITS)[0, -1]
    assert (bgr(picture())[0, 0].astype(int) - dark).max() < 20
    assert np.abs(bgr(picture())[0, -1].astype(int) - light).max() < 20


def test_16_bit_colour_keeps_its_high_byte() -> None:
    deep = np.random.default_rng(1).integers(0, 65535, (HEIGHT, WIDTH, 4), np.uint16)
    for channels in (3, 4):
        pixels = decode(cv2.imencode(".png", deep[:, :, :channels])[1].tobytes(), LIMITS)
        assert (pixels == deep[:, :, :3] >> 8).all()


def test_first_gif_frame_is_drawn_on_its_larger_canvas() -> None:
    data = bytearray(encoded("GIF"))
    # Enlarges the canvas; the frame then covers its top left.
    data[6:10] = struct.pack("<HH", WIDTH + 10, HEIGHT + 5)
    pixels = decode(bytes(data), LIMITS)
    assert pixels.shape == (HEIGHT + 5, WIDTH + 10, 3)
    assert difference(pixels[:HEIGHT, :WIDTH], bgr(Image.open(io.BytesIO(encoded("GIF"))))) <= 2


def test_grey_becomes_three_equal_channels() -> None:
    pixels = decode(encoded("JPEG", "L"), LIMITS)
    assert (pixels[:, :, 0] == pixels[:, :, 2]).all()


def test_16_bit_grey_keeps_its_high_byte() -> None:
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
def test_animation_gives_its_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "blue", "green")]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
    assert difference(decode(buffer.getvalue(), LIMITS), bgr(frames[0])) <= 2


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(form: str, orientation: int) -> None:
    # The turn that each orientation asks a viewer for.
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


def test_png_is_not_decoded_by_pillow_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("Pillow decoded the image"))
    assert decode(encoded("PNG"), LIMITS).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("kind", [b"eXIf", b"iTXt"])
def test_png_orientation_may_follow_the_pixels(kind: bytes) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x:xmpmeta xmlns:tiff="t" tiff:Orientation="6"/>'
    payload = exif.tobytes()[6:] if kind == b"eXIf" else xmp
    plain = encoded("PNG")
    end = plain.rindex(b"IEND") - 4
    data = plain[:end] + chunk(kind, payload) + plain[end:]
    assert (decode(data, LIMITS) == bgr(picture().transpose(Image.Transpose.ROTATE_270))).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_ignored() -> None:
    assert decode(encoded("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), LIMITS).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "WEBP", "GIF"])
def test_image_that_is_cut_short_is_refused(form: str) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 255, (300, 400, 3), np.uint8)
    Image.fromarray(noise).save(buffer, form)
    data = buffer.getvalue()
    for share in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(InvalidArgument, match="the image can't be decoded"):
            decode(data[: int(len(data) * share)], LIMITS)


@pytest.mark.parametrize("form", ["TIFF", "PPM", "ICO", "TGA", "JPEG2000"])
def test_other_formats_are_refused(form: str) -> None:
    with pytest.raises(InvalidArgument, match="not a JPEG, PNG, BMP, WebP or GIF"):
        decode(encoded(form), LIMITS)


@pytest.mark.parametrize("data", [b"", b"x", b"\xff\xd8\xff", b"GIF89a", b"<svg/>" * 100, bytes(1000)])
def test_data_that_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgument, match="the image can't be decoded"):
        decode(data, LIMITS)


def png_claiming(width: int, height: int) -> bytes:
    """Return a well-formed PNG of a few bytes whose header claims a size."""
    return png(chunk(b"IDAT", zlib.compress(b"")), width=width, height=height)


@pytest.mark.parametrize(("width", "height"), [(5000, 10), (10, 5000), (20000, 20000), (2**31 - 1, 2**31 - 1)])
def test_size_over_the_limits_is_refused_from_the_header(width: int, height: int) -> None:
    with pytest.raises(InvalidArgument, match=r"more than 4999x4999|far too many pixels"):
        decode(png_claiming(width, height), LIMITS)


def test_size_over_the_limits_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = cv2.imencode(".png", np.zeros((6000, 6000, 3), np.uint8))[1].tobytes()
    assert len(bomb) < 300_000
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("the image was decoded"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("the image was decoded"))
    with pytest.raises(InvalidArgument, match="6000x6000 pixels, more than 4999x4999"):
        decode(bomb, LIMITS)


def test_limits_are_inclusive_and_apply_to_the_stored_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded("JPEG", exif=exif)
    assert decode(data, Limits(len(data), WIDTH, HEIGHT)).shape == (WIDTH, HEIGHT, 3)
    for limits in (Limits(len(data) - 1), Limits(max_width=WIDTH - 1), Limits(max_height=HEIGHT - 1)):
        with pytest.raises(InvalidArgument, match=r"larger than|more than"):
            decode(data, limits)


def test_signature_of_another_format_is_refused() -> None:
    jpeg = encoded("JPEG")
    with pytest.raises(InvalidArgument):
        decode(b"\x89PNG\r\n\x1a\n" + jpeg, LIMITS)
    with pytest.raises(InvalidArgument):
        decode(b"RIFF" + jpeg, LIMITS)


def test_release_sets_the_limits() -> None:
    limits = Limits.of_release(Options("custom_values", {"max_bytes": 1000, "max_width": 20}))
    assert limits == Limits(1000, 20, 4999)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "10", None])
def test_invalid_limits_stop_the_start(value: object) -> None:
    with pytest.raises(StartError, match=r"custom_values\.max_bytes is .*, should be a positive integer"):
        Limits.of_release(Options("custom_values", {"max_bytes": value}))
