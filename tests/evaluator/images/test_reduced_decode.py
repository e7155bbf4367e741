"""Large JPEGs can be decoded smaller, also by the nets of a release that sets `custom_values.reduced_decode`."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from atserving.errors import InvalidArgument
from atserving.local.examples import ROOT
from evaluator.fetching.unpack import unpack
from evaluator.images import decode, read
from evaluator.limits import Limits
from evaluator.net_contract import Ret
from tests.evaluator.built_in import Array, config, loaded, start_error

EXAMPLES = ROOT / "examples"
LIMITS = Limits()
ENLARGED = 8


def large(form: str, width: int, height: int, orientation: int = 1) -> bytes:
    """Return a smooth image of this size."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    y, x = np.mgrid[0:32, 0:48]
    gradient = Image.fromarray(np.stack([x * 5, y * 7, 255 - x * 2 - y * 3], axis=-1).astype(np.uint8))
    buffer = io.BytesIO()
    gradient.resize((width, height), Image.Resampling.BICUBIC).save(buffer, form, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("size", "min_size", "expected"),
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
def test_jpeg_is_decoded_smaller_but_not_below_the_needed_size(
    size: tuple[int, int], min_size: tuple[int, int], expected: tuple[int, int]
) -> None:
    smaller = read(large("JPEG", *size), LIMITS, min_size)
    assert (smaller.pixels.shape, smaller.size) == ((expected[1], expected[0], 3), size)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_smaller_jpeg_is_upright_and_has_the_whole_images_size(orientation: int) -> None:
    data = large("JPEG", 640, 240, orientation)
    whole = decode(data, LIMITS)
    height, width = whole.shape[:2]
    # A quarter suffices if the image is wide; if it is high, it takes a half.
    smaller = read(data, LIMITS, (100, 60))
    assert smaller.size == (width, height)
    assert smaller.pixels.shape[:2] == ((60, 160) if orientation < 5 else (320, 120))
    shown = cv2.resize(whole, smaller.pixels.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(smaller.pixels.astype(int) - shown).mean() < 2


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_other_formats_are_decoded_whole(form: str) -> None:
    assert read(large(form, 640, 480), LIMITS, (28, 28)).pixels.shape == (480, 640, 3)


def test_limits_apply_to_the_whole_image() -> None:
    with pytest.raises(InvalidArgument, match="640x480 pixels, more than 639x4999"):
        read(large("JPEG", 640, 480), Limits(max_width=639), (28, 28))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_smaller_jpeg_that_is_cut_short_is_refused(share: float) -> None:
    data = large("JPEG", 640, 480)
    with pytest.raises(InvalidArgument, match="its data is broken or cut short"):
        read(data[: int(len(data) * share)], LIMITS, (80, 60))


def test_jpeg_is_decoded_whole_by_default() -> None:
    data = large("JPEG", 640, 480)
    np.testing.assert_array_equal(read(data, LIMITS).pixels, decode(data, LIMITS))
    assert decode(data, LIMITS).shape == (480, 640, 3)


def enlarged(path: Path) -> tuple[bytes, Array]:
    """Return a sample image as a large JPEG, and its original pixels."""
    image = cv2.imread(str(path))
    assert image is not None
    large = cv2.resize(image, None, fx=ENLARGED, fy=ENLARGED, interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", large)[1].tobytes(), image


def answer(app: str, body: bytes, folder: Path, **values: Any) -> Ret:
    folder.mkdir()
    net = loaded(app, config(unpack(EXAMPLES / app / f"digits-{app}-v1.tar", folder), **values))
    (ret,) = net.infer("r", [net.preprocess({"data": {"body": body}})])
    assert ret["code"] == 0
    return ret


@pytest.mark.parametrize("name", ["1.png", "2.png", "3.png"])
def test_boxes_are_in_pixels_of_the_whole_image(name: str, tmp_path: Path) -> None:
    body, _ = enlarged(EXAMPLES / "detect" / "images" / name)
    truth = json.loads((EXAMPLES / "detect" / "images" / "truth.json").read_text())[name]
    ret = answer("detect", body, tmp_path / "detect", reduced_decode=True)
    found = [(each["class"], np.array([*each["pts"][0], *each["pts"][2]])) for each in ret["result"]["detections"]]
    assert len(found) == len(truth)
    for each in truth:
        expected = np.array(each["box"]) * ENLARGED
        near = [np.abs(corners - expected).max() for name, corners in found if name == each["class"]]
        assert min(near) < 0.2 * (expected[3] - expected[1])


def test_masks_have_the_size_of_the_whole_image(tmp_path: Path) -> None:
    body, image = enlarged(EXAMPLES / "segment" / "images" / "1.png")
    masks = []
    for reduced in (False, True):
        ret = answer("segment", body, tmp_path / str(reduced), reduced_decode=reduced)
        data = base64.b64decode(ret["result"]["mask"].partition(",")[2])
        masks.append(decode(data, LIMITS))
    assert masks[1].shape == (image.shape[0] * ENLARGED, image.shape[1] * ENLARGED, 3)
    assert (masks[0] == masks[1]).all(axis=2).mean() > 0.98


def test_nets_decode_the_whole_image_by_default(tmp_path: Path) -> None:
    body, _ = enlarged(EXAMPLES / "detect" / "images" / "1.png")
    release = unpack(EXAMPLES / "detect" / "digits-detect-v1.tar", tmp_path)
    models = [loaded("detect", config(release, **values)) for values in ({}, {"reduced_decode": True})]
    whole, smaller = (model.preprocess({"data": {"body": body}}) for model in models)
    plain = decode(body, LIMITS)
    np.testing.assert_array_equal(whole.pixels, cv2.resize(plain, (128, 128), interpolation=cv2.INTER_LINEAR))
    assert whole.size == smaller.size == plain.shape[1::-1]
    assert not np.array_equal(whole.pixels, smaller.pixels)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_invalid_value_stops_the_start(value: object, tmp_path: Path) -> None:
    release = unpack(EXAMPLES / "detect" / "digits-detect-v1.tar", tmp_path)
    error = start_error("detect", config(release, reduced_decode=value))
    assert error == f"custom_values.reduced_decode is {value!r}, should be true or false"
