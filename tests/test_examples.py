"""The example apps other than `digits`: their releases are well formed, and their nets label held-out images correctly.

The tests run the evaluator's own nets, with the custom values of the local mesh.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from atserving.local import examples
from evaluator.caffe import convert
from evaluator.nets import labels
from evaluator.nets.image_input import ImageNet
from evaluator.nets.palette import palette
from examples.detect.boxes import average_precision, overlaps
from tests.evaluator.built_in import config, evaluate, loaded

Array = NDArray[np.float32]

EXAMPLES = examples.FOLDER
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LABELS = dict(enumerate(("background", *DIGITS)))
MODEL_FILES = {"deploy.prototxt", "mean.binaryproto", "weight.caffemodel"}
LEAST_OVERLAP = 0.5
LEAST_PRECISION = 0.95
"""The lowest mean average precision over the digits on the samples."""
LEAST_IOU = 0.85
"""The lowest mean over the labels of a mask or its truth, for one sample and for all samples together."""


@dataclass(frozen=True)
class Release:
    tar: Path
    folder: Path
    """The folder with the tar's members."""


def unpacked(app: str, folder: Path) -> Release:
    path = EXAMPLES / app / f"digits-{app}-v1.tar"
    with tarfile.open(path, "r:") as tar:
        tar.extractall(folder, filter="data")
    return Release(path, folder)


@pytest.fixture(scope="module", params=["detect", "segment", "similar"])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return unpacked(request.param, tmp_path_factory.mktemp("release"))


def converted(folder: Path) -> onnxruntime.InferenceSession:
    model = convert(folder / "deploy.prototxt", folder / "weight.caffemodel")
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def model(app: str, folder: Path) -> ImageNet:
    """Load the release as the evaluator does."""
    unpacked(app, folder)
    [example] = [each for each in examples.ALL if each.app == f"digits-{app}"]
    return loaded(app, config({path.name: path for path in folder.iterdir()}, **example.custom_values))


@pytest.fixture(scope="module")
def detect(tmp_path_factory: pytest.TempPathFactory) -> ImageNet:
    return model("detect", tmp_path_factory.mktemp("detect"))


@pytest.fixture(scope="module")
def segment(tmp_path_factory: pytest.TempPathFactory) -> ImageNet:
    return model("segment", tmp_path_factory.mktemp("segment"))


def sample(path: Path, flags: int = cv2.IMREAD_COLOR) -> NDArray[np.uint8]:
    image = cv2.imread(str(path), flags)
    assert image is not None
    return image.astype(np.uint8)


def samples(app: str) -> list[Any]:
    truth = json.loads((EXAMPLES / app / "images" / "truth.json").read_text())
    return [pytest.param(EXAMPLES / app / "images" / name, what, id=name) for name, what in truth.items()]


def test_tar_has_the_files_of_a_release_and_stays_small(release: Release) -> None:
    more = {"net.py"} if "similar" in release.tar.name else {"labels.csv"}
    with tarfile.open(release.tar, "r:") as tar:
        assert tar.getnames() == sorted(MODEL_FILES | more)
    assert release.tar.stat().st_size < 2_000_000


def test_tar_depends_on_nothing_but_its_members(release: Release) -> None:
    with tarfile.open(release.tar, "r:") as tar:
        infos = tar.getmembers()
    assert all(info.isreg() for info in infos)
    assert {(info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) for info in infos} == {
        (1541764800, 0, 0, "", "", 0o644)
    }


def test_net_converts_and_accepts_a_batch(release: Release) -> None:
    session = converted(release.folder)
    (blob,) = session.get_inputs()
    assert blob.name == "data"
    session.run(None, {"data": np.zeros((3, *blob.shape[1:]), np.float32)})


@pytest.mark.parametrize("app", ["detect", "segment"])
def test_prototxt_beside_the_tar_equals_the_one_in_it(app: str, tmp_path: Path) -> None:
    release = unpacked(app, tmp_path)
    assert (EXAMPLES / app / "deploy.prototxt").read_bytes() == (release.folder / "deploy.prototxt").read_bytes()
    assert labels.read(release.folder / "labels.csv") == LABELS


@pytest.mark.parametrize("app", ["detect", "segment"])
def test_samples_have_three_sizes(app: str) -> None:
    assert len({sample(param.values[0]).shape for param in samples(app)}) == 3


@dataclass(frozen=True)
class Found:
    """The detections on an image: rows (score, x1, y1, x2, y2), and a class for each row."""

    rows: Array
    classes: list[str]

    def of(self, name: str) -> Array:
        return self.rows[[each == name for each in self.classes]]


def found_on(model: ImageNet, image: NDArray[np.uint8], params: dict[str, Any] | None = None) -> Found:
    (ret,) = evaluate(model, (image, params))
    assert ret["code"] == 0
    detections = ret["result"]["detections"]
    rows = [[each["score"], *each["pts"][0], *each["pts"][2]] for each in detections]
    return Found(np.array(rows, np.float32).reshape(-1, 5), [each["class"] for each in detections])


@pytest.mark.parametrize(("path", "truth"), samples("detect"))
def test_detector_finds_every_digit_and_nothing_else(path: Path, truth: list[dict[str, Any]], detect: ImageNet) -> None:
    found = found_on(detect, sample(path))
    assert len(found.rows) == len(truth) >= 2
    overlap = overlaps(np.array([digit["box"] for digit in truth], np.float32), found.rows[:, 1:])
    assert (overlap.max(axis=1) >= LEAST_OVERLAP).all()
    assert [found.classes[best] for best in overlap.argmax(axis=1)] == [digit["class"] for digit in truth]


def test_detector_reaches_the_mean_average_precision_on_the_samples(detect: ImageNet) -> None:
    truths = [param.values[1] for param in samples("detect")]
    # This equals the net's own confidence_threshold, so unsure detections count too.
    everything = [found_on(detect, sample(param.values[0]), {"threshold": 0.01}) for param in samples("detect")]
    assert sum(len(found.rows) for found in everything) > sum(map(len, truths))
    precisions = [
        average_precision(
            [found.of(name) for found in everything],
            [
                np.array([digit["box"] for digit in truth if digit["class"] == name], np.float32).reshape(-1, 4)
                for truth in truths
            ],
        )
        for name in {digit["class"] for truth in truths for digit in truth}
    ]
    assert len(precisions) >= 5
    assert np.mean(precisions) >= LEAST_PRECISION


def test_detector_finds_nothing_on_an_empty_scene(detect: ImageNet) -> None:
    assert not found_on(detect, np.full((120, 160, 3), 50, np.uint8)).classes


def labels_of(model: ImageNet, image: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the label of each pixel, from its colour on the mask."""
    (ret,) = evaluate(model, (image, None))
    assert ret["code"] == 0
    data = base64.b64decode(ret["result"]["mask"].partition(",")[2])
    mask = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert mask is not None
    same = (mask[:, :, None, ::-1] == palette()[: len(LABELS)]).all(axis=3)
    assert (same.sum(axis=2) == 1).all()
    found: NDArray[np.int64] = same.argmax(axis=2)
    return found


def unions(truth: NDArray[Any], found: NDArray[Any]) -> list[float]:
    """Return the intersection over union of each label in either mask."""
    return [
        ((truth == label) & (found == label)).sum() / ((truth == label) | (found == label)).sum()
        for label in np.union1d(truth, found)
    ]


@pytest.mark.parametrize(("path", "truth"), samples("segment"))
def test_segmenter_marks_the_true_pixels(path: Path, truth: dict[str, Any], segment: ImageNet) -> None:
    mask = sample(path.parent / truth["mask"], cv2.IMREAD_GRAYSCALE)
    assert {LABELS[label] for label in np.unique(mask).tolist()} == {"background", *truth["classes"]}
    found = labels_of(segment, sample(path))
    assert found.shape == mask.shape
    assert np.mean(unions(mask, found)) >= LEAST_IOU


def test_segmenter_reaches_the_mean_intersection_over_union_on_the_samples(segment: ImageNet) -> None:
    pairs = [(param.values[0], param.values[1]["mask"]) for param in samples("segment")]
    masks = [sample(path.parent / mask, cv2.IMREAD_GRAYSCALE).ravel() for path, mask in pairs]
    found = [labels_of(segment, sample(path)).ravel() for path, _ in pairs]
    each = unions(np.concatenate(masks), np.concatenate(found))
    assert len(each) >= 5
    assert np.mean(each) >= LEAST_IOU


@dataclass(frozen=True)
class Script:
    module: ModuleType
    model: dict[str, Any]

    def answer(self, *reqs: dict[str, Any]) -> list[dict[str, Any]]:
        prepared = [self.module.net_preprocess(self.model, req) for req in reqs]
        rets: list[dict[str, Any]] = self.module.net_inference(self.model, {"reqid": "r", "reqs": prepared})
        return rets


@pytest.fixture(scope="module")
def similar(tmp_path_factory: pytest.TempPathFactory) -> Script:
    folder = unpacked("similar", tmp_path_factory.mktemp("similar")).folder
    spec = importlib.util.spec_from_file_location("similar_net", folder / "net.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.net_init(
        {
            "tar_files": {path.name: str(path) for path in folder.iterdir()},
            "image_width": None,
            "use_device": "CPU",
            "batch_size": None,
            "custom_files": {},
            "custom_values": {},
            "model_params": {},
        }
    )
    assert model["error"] == ""
    return Script(module, model)


def digit(name: str) -> dict[str, Any]:
    return {"uri": name, "body": (EXAMPLES / "digits" / "images" / name).read_bytes()}


def pair(first: str, second: str, **params: object) -> dict[str, Any]:
    return {"data": [digit(first), digit(second)], "params": params}


def test_script_in_the_tar_equals_the_one_beside_it(tmp_path: Path) -> None:
    folder = unpacked("similar", tmp_path).folder
    assert (EXAMPLES / "similar" / "net.py").read_bytes() == (folder / "net.py").read_bytes()


def test_script_gives_the_same_digit_a_higher_similarity_than_another(similar: Script) -> None:
    rets = similar.answer(pair("5.png", "5.jpg"), pair("5.png", "7.png"), pair("3.png", "3.png"))
    assert [ret["code"] for ret in rets] == [0, 0, 0]
    fives, others, itself = (ret["result"]["similarity"] for ret in rets)
    assert fives > 0.7 > 0.5 > others
    assert itself == pytest.approx(1, abs=1e-6)


def test_similarity_equals_the_cosine_of_the_streamed_embeddings(similar: Script) -> None:
    stream, plain = similar.answer(pair("5.png", "7.png", format="stream"), pair("5.png", "7.png", format="json"))
    first, second = np.frombuffer(stream["result_file"], "<f4").reshape(2, 64)
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert plain["result"]["similarity"] == pytest.approx(cosine, abs=1e-6)


@pytest.mark.parametrize(
    "req",
    [
        {"data": digit("1.png")},
        {"data": [digit("1.png")], "params": None},
        {"data": [digit("1.png")] * 3, "params": {}},
        {"data": [], "params": {}},
        {"data": [digit("1.png")] * 2, "params": {"format": "xml"}},
        {"data": [digit("1.png")] * 2, "params": {"format": ["json"]}},
        {"data": [digit("1.png")] * 2, "params": "json"},
    ],
)
def test_script_refuses_only_the_request_without_a_group_of_two(similar: Script, req: dict[str, Any]) -> None:
    refused, answered = similar.answer(req, pair("1.png", "1.png"))
    assert refused["code"] == 400
    assert refused["message"]
    assert answered["code"] == 0
    assert similar.answer(req)[0]["code"] == 400
