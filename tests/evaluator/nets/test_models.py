"""Published networks give correct results over real gRPC, with the preprocessing of their authors.

The repository does not contain them; `test_served.py` promises the same with nets of our own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.caffe.nets import MODELS, error
from tests.evaluator import mtcnn
from tests.evaluator.built_in import Array, png
from tests.evaluator.digits import DIGITS
from tests.processes import Registry

from .served import (
    BAD_LAYERS,
    BAD_LIMITS,
    BAD_THRESHOLDS,
    Box,
    RunningRelease,
    boxes,
    check_refusals,
    connected_release,
    odd_images,
    overlap,
    serving,
    write_tar,
)

pytestmark = pytest.mark.skipif(not MODELS.is_dir(), reason="the real models are not here")

# Left, top, right and bottom of every face, from the hairline to the chin, measured by eye.
FACES: dict[str, list[Box]] = {
    "mtcnn_test1.jpg": [(84, 25, 154, 107), (300, 85, 366, 175)],
    "voc000001.jpg": [(150, 54, 275, 220)],
    "cat.jpg": [],
}
# The faces of the eight children on the stored input of some networks, in a picture of 640x480.
CHILDREN: list[Box] = [
    (100, 88, 172, 178),
    (205, 66, 258, 138),
    (318, 75, 398, 170),
    (440, 100, 505, 197),
    (102, 205, 190, 312),
    (225, 165, 308, 275),
    (357, 200, 440, 295),
    (520, 195, 597, 288),
]

DETECTORS: dict[str, dict[str, Any]] = {
    "yuface_ssd_v1": {"mean_values": [104, 117, 123]},
    "ultraface_rfb320": {
        "channel_swap": [2, 1, 0],
        "mean_values": [127],
        "input_scale": 1 / 128,
        "head": {
            "kind": "ssd",
            "scores": "scores",
            "boxes": "boxes",
            "levels": [
                {"stride": 8, "anchors": [[10, 10], [16, 16], [24, 24]]},
                {"stride": 16, "anchors": [[32, 32], [48, 48]]},
                {"stride": 32, "anchors": [[64, 64], [96, 96]]},
                {"stride": 64, "anchors": [[128, 128], [192, 192], [256, 256]]},
            ],
            "nms_threshold": 0.3,
        },
    },
    "retinaface_mnet25": {
        "channel_swap": [2, 1, 0],
        "head": {
            "kind": "retinaface",
            "levels": [
                {
                    "scores": f"face_rpn_cls_prob_reshape_stride{stride}",
                    "boxes": f"face_rpn_bbox_pred_stride{stride}",
                    "stride": stride,
                    "anchors": [[large, large], [large // 2, large // 2]],
                }
                for stride, large in ((32, 512), (16, 128), (8, 32))
            ],
        },
    },
    "yoloface_500k": {
        "channel_swap": [2, 1, 0],
        "input_scale": 1 / 255,
        "head": {
            "kind": "yolo",
            "levels": [
                {"output": "layer71-conv", "stride": 32, "anchors": [[47, 60], [83, 97], [141, 149]]},
                {"output": "layer83-conv", "stride": 16, "anchors": [[16, 24], [33, 25], [26, 41]]},
                {"output": "layer95-conv", "stride": 8, "anchors": [[4, 6], [7, 10], [11, 15]]},
            ],
            "nms_threshold": 0.45,
        },
    },
}


@asynccontextmanager
async def serve_model(
    registry: Registry, folder: Path, model: str, members: dict[str, Path] | None = None, **custom_values: Any
) -> AsyncIterator[RunningRelease]:
    """Serve one of the models, with these members added to its tar; the app has the folder's name."""
    files = {name: MODELS / model / name for name in ("deploy.prototxt", "weight.caffemodel")} | (members or {})
    tar = write_tar(folder / f"{model}.tar", files)
    with serving(registry, folder.name, tar, **custom_values) as process:
        async with connected_release(process) as release:
            yield release


def photograph(name: str) -> bytes:
    return (MODELS / "images" / name).read_bytes()


def stored(model: str, blob: str) -> Array:
    with np.load(MODELS / model / "expected.npz") as arrays:
        array: Array = arrays[f"img1|{blob}"]
        return array


def children(model: str) -> Array:
    """Return the picture of a network's stored input, in the size of its input: (height, width, 3)."""
    values = DETECTORS[model]
    means = np.reshape(values.get("mean_values", [0]), (-1, 1, 1))
    planes: Array = np.rint(stored(model, "in")[0] / values.get("input_scale", 1) + means)
    return planes.transpose(1, 2, 0)


def check_faces(found: list[Box], faces: list[Box]) -> None:
    """Assert that each face is found once, and nothing else."""
    assert len(found) == len(faces), found
    for face in faces:
        assert max(overlap(face, box) for box in found) > 0.5, (face, found)


async def test_lenet_classifies_the_digits(registry: Registry, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("".join(f"{digit},digit {digit}\n" for digit in range(10)))
    async with serve_model(registry, tmp_path, "lenet_mnist", {"labels.csv": labels}, input_scale=1 / 256) as lenet:
        for digit in range(10):
            # The digits of MNIST have a margin.
            image = cv2.imread(str(DIGITS / "images" / f"{digit}.png"))
            assert image is not None
            body = png(cv2.copyMakeBorder(image, 13, 13, 13, 13, cv2.BORDER_CONSTANT))
            (best,) = (await lenet.result(body))["confidences"]
            assert (best["index"], best["class"]) == (digit, f"digit {digit}")
            assert best["score"] > 0.6
        for image in odd_images():
            confidences = (await lenet.result(png(image), limit=100))["confidences"]
            assert sorted(each["index"] for each in confidences) == list(range(10))
            assert sum(each["score"] for each in confidences) == pytest.approx(1)
        await check_refusals(lenet, photograph("cat.jpg"), {"limit": BAD_LIMITS})


async def test_cifar10_classifies_the_cat(registry: Registry, tmp_path: Path) -> None:
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    labels = tmp_path / "labels.csv"
    labels.write_text("".join(f"{index},{name}\n" for index, name in enumerate(names)))
    members = {"labels.csv": labels, "mean.binaryproto": MODELS / "cifar10_quick" / "mean.binaryproto"}
    async with serve_model(registry, tmp_path, "cifar10_quick", members) as cifar10:
        whole = (await cifar10.result(photograph("cat.jpg"), limit=2))["confidences"]
        assert "cat" in [each["class"] for each in whole]
        image = cv2.imdecode(np.frombuffer(photograph("cat.jpg"), np.uint8), cv2.IMREAD_COLOR)
        assert image is not None
        (closer,) = (await cifar10.result(png(image[20:200, 150:340])))["confidences"]
        assert closer["class"] == "cat"
        assert closer["score"] > 0.8


@pytest.mark.parametrize("model", ["mtcnn_det1", "mtcnn_det2"])
async def test_features_equal_those_of_caffe(registry: Registry, tmp_path: Path, model: str) -> None:
    values: dict[str, Any] = {"net": "feature", "output": "prob1", "mean_values": [127.5], "input_scale": 1 / 128}
    async with serve_model(registry, tmp_path, model, **values) as net:
        layer = "conv4-2" if model == "mtcnn_det1" else "conv5-2"
        for params, blob in (({}, "prob1"), ({"layer": "prob1"}, "prob1"), ({"layer": layer}, layer)):
            numbers = await net.stream(photograph("mtcnn_test1.jpg"), **params)
            assert error(numbers, stored(model, f"out|{blob}").ravel()) < 1e-4
        for image in odd_images():
            assert (await net.stream(png(image))).sum() == pytest.approx(1)
        await check_refusals(net, photograph("cat.jpg"), {"layer": BAD_LAYERS})


@pytest.mark.parametrize("model", DETECTORS)
async def test_detector_finds_every_face_and_nothing_else(registry: Registry, tmp_path: Path, model: str) -> None:
    async with serve_model(registry, tmp_path, model, net="detect", **DETECTORS[model]) as detector:
        for name, faces in FACES.items():
            body = photograph(name)
            picture = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR)
            assert picture is not None
            height, width = picture.shape[:2]
            check_faces(boxes(await detector.result(body, threshold=0.8), (width, height)), faces)
        if model != "retinaface_mnet25":  # its input is twice as high as the children's picture
            image = children(model)
            height, width = image.shape[:2]
            found = boxes(await detector.result(png(image), threshold=0.8), (width, height))
            check_faces([np.array(box) * np.tile([640 / width, 480 / height], 2) for box in found], CHILDREN)
        for image in odd_images():
            result = await detector.result(png(image), threshold=0)
            assert len(boxes(result, (image.shape[1], image.shape[0]))) <= 1000
        await check_refusals(detector, photograph("cat.jpg"), {"threshold": BAD_THRESHOLDS})


async def test_detections_equal_those_of_opencv(registry: Registry, tmp_path: Path) -> None:
    values = DETECTORS["yuface_ssd_v1"]
    image = children("yuface_ssd_v1")
    async with serve_model(registry, tmp_path, "yuface_ssd_v1", net="detect", **values) as detector:
        found = (await detector.result(png(image), threshold=0.3))["detections"]
    rows = stored("yuface_ssd_v1", "out|detection_out").reshape(-1, 7)
    rows = rows[rows[:, 2] >= 0.3]
    rows = rows[np.argsort(-rows[:, 2], kind="stable")]
    corners = np.rint(np.clip(rows[:, 3:], 0, 1) * [320, 240, 320, 240])
    np.testing.assert_allclose([each["score"] for each in found], rows[:, 2], atol=1e-4)
    np.testing.assert_allclose([each["pts"][0] + each["pts"][2] for each in found], corners, atol=1)


async def test_script_with_two_nets_finds_faces(registry: Registry, tmp_path: Path) -> None:
    members = {
        "net.py": Path(mtcnn.__file__),
        "det2.prototxt": MODELS / "mtcnn_det2" / "deploy.prototxt",
        "det2.caffemodel": MODELS / "mtcnn_det2" / "weight.caffemodel",
    }
    async with serve_model(registry, tmp_path, "mtcnn_det1", members) as script:
        for name, faces in FACES.items():
            found = [each["box"] for each in (await script.result(photograph(name)))["faces"]]
            check_faces([(left, top, left + width, top + height) for left, top, width, height in found], faces)
        assert (await script.result(png(np.zeros((1, 1, 3)))))["faces"] == []
        assert (await script.ask(b"no image")).error.code == 400
