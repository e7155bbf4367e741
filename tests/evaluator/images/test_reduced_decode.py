"""`custom_values.reduced_decode`: large JPEGs are decoded smaller, and answers are still about the whole image."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from atserving.local.examples import ROOT
from evaluator.fetching.unpack import unpack
from evaluator.net_contract import Ret
from tests.evaluator.built_in import Array, config, loaded, start_error

EXAMPLES = ROOT / "examples"
ENLARGED = 8


def enlarged(path: Path) -> tuple[bytes, Array]:
    """A sample image as a large JPEG, and its pixels before."""
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
        masks.append(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))
    assert masks[1].shape == (image.shape[0] * ENLARGED, image.shape[1] * ENLARGED, 3)
    assert (masks[0] == masks[1]).all(axis=2).mean() > 0.98


def test_by_default_pixels_are_those_of_the_whole_image(tmp_path: Path) -> None:
    body, _ = enlarged(EXAMPLES / "detect" / "images" / "1.png")
    release = unpack(EXAMPLES / "detect" / "digits-detect-v1.tar", tmp_path)
    models = [loaded("detect", config(release, **values)) for values in ({}, {"reduced_decode": True})]
    whole, smaller = (model.preprocess({"data": {"body": body}}) for model in models)
    plain = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(whole.pixels, cv2.resize(plain, (128, 128), interpolation=cv2.INTER_LINEAR))
    assert whole.size == smaller.size == plain.shape[1::-1]
    assert not np.array_equal(whole.pixels, smaller.pixels)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_a_wrong_value_stops_the_start(value: object, tmp_path: Path) -> None:
    release = unpack(EXAMPLES / "detect" / "digits-detect-v1.tar", tmp_path)
    error = start_error("detect", config(release, reduced_decode=value))
    assert error == f"custom_values.reduced_decode is {value!r}, should be true or false"
