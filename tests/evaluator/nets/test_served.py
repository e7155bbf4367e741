"""Nets of our own give correct results over real gRPC."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from atserving.local.examples import FOLDER
from evaluator.runtime.preprocessing import read_mean
from tests.caffe.nets import error
from tests.evaluator import cascade
from tests.evaluator.built_in import Array, files, png
from tests.evaluator.digits import DIGITS
from tests.processes import Process, Registry

from .head_nets import YOLO, YOLO_HEAD, YOLO_WEIGHTS, picture
from .served import (
    BAD_LAYERS,
    BAD_LIMITS,
    BAD_THRESHOLDS,
    Box,
    boxes,
    check_refusals,
    connected_release,
    odd_images,
    overlap,
    serving,
    write_tar,
)

DIGITS_TAR = DIGITS / "digits-v1.tar"
DETECT_TAR = FOLDER / "detect" / "digits-detect-v1.tar"
SEGMENT_TAR = FOLDER / "segment" / "digits-segment-v1.tar"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
JPEG = (DIGITS / "images" / "5.jpg").read_bytes()
TRUTH: dict[str, list[dict[str, Any]]] = json.loads((FOLDER / "detect" / "images" / "truth.json").read_text())


def unpacked(tar: Path, folder: Path) -> dict[str, Path]:
    with tarfile.open(tar) as archive:
        archive.extractall(folder, filter="data")
    return {path.name: path for path in folder.iterdir()}


def scene(name: str) -> tuple[bytes, tuple[int, int]]:
    """Return an image with digits, and its width and height."""
    path = FOLDER / "detect" / "images" / name
    image = cv2.imread(str(path))
    assert image is not None
    return path.read_bytes(), (image.shape[1], image.shape[0])


def opencv_outputs(release: dict[str, Path], image: Array, *layers: str) -> list[Array]:
    """Return OpenCV's outputs for an image of the net's own size, (height, width, 3)."""
    net = cv2.dnn.readNetFromCaffe(str(release["deploy.prototxt"]), str(release["weight.caffemodel"]))
    planes = image.transpose(2, 0, 1).astype(np.float32) - read_mean(release["mean.binaryproto"])
    net.setInput(planes[np.newaxis])
    return list(net.forward(list(layers)))


@pytest.fixture(scope="module")
def detector(registry: Registry) -> Iterator[Process]:
    with serving(registry, "served-detect", DETECT_TAR, net="detect") as process:
        yield process


async def test_classifier_names_the_digits(registry: Registry) -> None:
    with serving(registry, "served-digits", DIGITS_TAR, net="classify") as process:
        async with connected_release(process) as digits:
            for digit, name in enumerate(NAMES):
                (best,) = (await digits.result((DIGITS / "images" / f"{digit}.png").read_bytes()))["confidences"]
                assert (best["index"], best["class"]) == (digit, name)
                assert best["score"] > 0.6
            for image in odd_images():
                confidences = (await digits.result(png(image), limit=100))["confidences"]
                assert sorted(each["index"] for each in confidences) == list(range(10))
                assert sum(each["score"] for each in confidences) == pytest.approx(1)
            await check_refusals(digits, JPEG, {"limit": BAD_LIMITS})


async def test_features_equal_those_of_opencv(registry: Registry, tmp_path: Path) -> None:
    release = unpacked(DIGITS_TAR, tmp_path)
    image = cv2.imread(str(DIGITS / "images" / "7.png"))
    assert image is not None
    image = cv2.resize(image, (28, 28))
    expected = dict(zip(("prob", "ip1"), opencv_outputs(release, image, "prob", "relu3"), strict=True))
    with serving(registry, "served-feature", DIGITS_TAR, net="feature", layers=["ip1"]) as process:
        async with connected_release(process) as net:
            for params, layer in (({}, "prob"), ({"layer": "prob"}, "prob"), ({"layer": "ip1"}, "ip1")):
                assert error(await net.stream(png(image), **params), expected[layer].ravel()) < 1e-4
            for odd in odd_images():
                assert (await net.stream(png(odd))).sum() == pytest.approx(1)
            await check_refusals(net, JPEG, {"layer": BAD_LAYERS})


async def test_detector_finds_every_digit_and_nothing_else(detector: Process) -> None:
    async with connected_release(detector) as net:
        for name, truth in TRUTH.items():
            body, size = scene(name)
            result = await net.result(body)
            check_found(boxes(result, size), [each["class"] for each in result["detections"]], truth)
        for image in odd_images():
            result = await net.result(png(image), threshold=0)
            assert len(boxes(result, (image.shape[1], image.shape[0]))) <= 1000
        await check_refusals(net, JPEG, {"threshold": BAD_THRESHOLDS})


def check_found(found: list[Box], classes: list[str], truth: list[dict[str, Any]]) -> None:
    """Assert that each digit is found once with the right class, and nothing else."""
    assert len(found) == len(truth), found
    for digit in truth:
        overlaps = [overlap(digit["box"], box) for box in found]
        assert max(overlaps) > 0.5, (digit, found)
        assert classes[int(np.argmax(overlaps))] == digit["class"]


async def test_detections_equal_those_of_opencv(detector: Process, tmp_path: Path) -> None:
    body, _ = scene("1.png")
    image = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    image = cv2.resize(image, (128, 128))
    (rows,) = opencv_outputs(unpacked(DETECT_TAR, tmp_path), image, "detection_out")
    rows = rows.reshape(-1, 7)
    rows = rows[rows[:, 2] >= 0.3]
    rows = rows[np.argsort(-rows[:, 2], kind="stable")]
    async with connected_release(detector) as net:
        found = (await net.result(png(image), threshold=0.3))["detections"]
    assert len(rows) >= 3
    np.testing.assert_allclose([each["score"] for each in found], rows[:, 2], atol=1e-4)
    corners = np.clip(np.rint(rows[:, 3:] * 128), 0, 127)
    np.testing.assert_allclose([each["pts"][0] + each["pts"][2] for each in found], corners, atol=1)


async def test_head_of_the_release_reads_the_grids_of_its_net(registry: Registry, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "grids.tar", files(tmp_path, YOLO, YOLO_WEIGHTS, "0,red\n1,blue\n"))
    with serving(registry, "served-head", tar, net="detect", head=YOLO_HEAD) as process:
        async with connected_release(process) as net:
            result = await net.result(png(picture((1, 2, 0))))
            assert boxes(result, (64, 32)) == [(40, 16, 48, 31)]
            assert [each["class"] for each in result["detections"]] == ["blue"]


async def test_script_with_two_nets_finds_and_names_digits(registry: Registry, tmp_path: Path) -> None:
    second = unpacked(SEGMENT_TAR, tmp_path / "second")
    members = unpacked(DETECT_TAR, tmp_path / "first") | {
        "net.py": Path(cascade.__file__),
        "second.prototxt": second["deploy.prototxt"],
        "second.caffemodel": second["weight.caffemodel"],
        "second.binaryproto": second["mean.binaryproto"],
    }
    with serving(registry, "served-cascade", write_tar(tmp_path / "cascade.tar", members)) as process:
        async with connected_release(process) as script:
            for name, truth in TRUTH.items():
                digits = (await script.result(scene(name)[0]))["digits"]
                check_found([each["box"] for each in digits], [each["class"] for each in digits], truth)
            assert (await script.result(png(np.zeros((1, 1, 3)))))["digits"] == []
            assert (await script.ask(b"no image")).error.code == 400
