"""The example apps beside `digits`: well-formed releases, whose nets are right about the sample images."""

from __future__ import annotations

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

from evaluator import labels
from evaluator.caffe import convert, read_mean
from evaluator.preprocess import Transformer

Array = NDArray[np.float32]

EXAMPLES = Path(__file__).parent.parent / "examples"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LABELS = dict(enumerate(("background", *DIGITS)))
MODEL_FILES = {"deploy.prototxt", "mean.binaryproto", "weight.caffemodel"}
INPUT_SIZE = 128
LEAST_SCORE = 0.5
LEAST_OVERLAP = 0.5
LEAST_MEAN_IOU = 0.85
"""Of a sample's mask, over the labels that it or its truth has."""


@dataclass(frozen=True)
class Release:
    tar: Path
    folder: Path
    """Where the tar's members lie."""


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


@pytest.fixture(scope="module")
def detect(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return unpacked("detect", tmp_path_factory.mktemp("detect"))


@pytest.fixture(scope="module")
def segment(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return unpacked("segment", tmp_path_factory.mktemp("segment"))


def input_of(release: Release, image: NDArray[np.uint8]) -> Array:
    """What the server makes of an image without any custom values."""
    transform = Transformer((3, INPUT_SIZE, INPUT_SIZE), mean=read_mean(release.folder / "mean.binaryproto"))
    return transform(image)[np.newaxis]


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


def test_net_converts_and_takes_batches(release: Release) -> None:
    session = converted(release.folder)
    (blob,) = session.get_inputs()
    assert blob.name == "data"
    session.run(None, {"data": np.zeros((3, *blob.shape[1:]), np.float32)})


@pytest.mark.parametrize("app", ["detect", "segment"])
def test_prototxt_beside_the_tar_is_the_one_in_it(app: str, tmp_path: Path) -> None:
    release = unpacked(app, tmp_path)
    assert (EXAMPLES / app / "deploy.prototxt").read_bytes() == (release.folder / "deploy.prototxt").read_bytes()
    assert labels.read(release.folder / "labels.csv") == LABELS


@pytest.mark.parametrize("app", ["detect", "segment"])
def test_there_are_three_samples_of_three_sizes(app: str) -> None:
    assert len({sample(param.values[0]).shape for param in samples(app)}) == 3


def detections(release: Release, image: NDArray[np.uint8]) -> Array:
    """Rows (label, score, x1, y1, x2, y2), in the image's pixels."""
    rows: Array = converted(release.folder).run(["detection_out"], {"data": input_of(release, image)})[0]
    height, width = image.shape[:2]
    return rows.reshape(-1, 7)[:, 1:] * np.array([1, 1, width, height, width, height], np.float32)


def overlap(first: NDArray[Any], second: NDArray[Any]) -> float:
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    both = np.clip(sides, 0, None).prod()
    return float(both / ((first[2:] - first[:2]).prod() + (second[2:] - second[:2]).prod() - both))


@pytest.mark.parametrize(("path", "truth"), samples("detect"))
def test_detector_finds_every_digit_and_nothing_else(path: Path, truth: list[dict[str, Any]], detect: Release) -> None:
    rows = detections(detect, sample(path))
    sure = rows[rows[:, 1] >= LEAST_SCORE]
    assert len(sure) == len(truth) >= 2
    for digit in truth:
        box = np.array(digit["box"], np.float32)
        best = max(sure, key=lambda row: overlap(row[2:], box))
        assert overlap(best[2:], box) >= LEAST_OVERLAP
        assert LABELS[int(best[0])] == digit["class"]


def test_detector_answers_no_rows_for_an_empty_scene(detect: Release) -> None:
    rows = detections(detect, np.full((120, 160, 3), 50, np.uint8))
    assert not (rows[:, 1] >= LEAST_SCORE).any()


@pytest.mark.parametrize(("path", "truth"), samples("segment"))
def test_segmenters_mask_agrees_with_the_truth(path: Path, truth: dict[str, Any], segment: Release) -> None:
    image = sample(path)
    mask = sample(path.parent / truth["mask"], cv2.IMREAD_GRAYSCALE)
    scores = converted(segment.folder).run(["score"], {"data": input_of(segment, image)})[0]
    assert scores.shape == (1, len(LABELS), INPUT_SIZE, INPUT_SIZE)
    height, width = mask.shape
    found = cv2.resize(scores[0].transpose(1, 2, 0), (width, height)).argmax(axis=2)
    present = np.union1d(mask, found)
    unions = [
        ((mask == label) & (found == label)).sum() / ((mask == label) | (found == label)).sum() for label in present
    ]
    assert {LABELS[label] for label in np.unique(mask).tolist()} == {"background", *truth["classes"]}
    assert np.mean(unions) >= LEAST_MEAN_IOU


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


def test_script_in_the_tar_is_the_one_beside_it(tmp_path: Path) -> None:
    folder = unpacked("similar", tmp_path).folder
    assert (EXAMPLES / "similar" / "net.py").read_bytes() == (folder / "net.py").read_bytes()


def test_the_same_digit_is_more_alike_than_another(similar: Script) -> None:
    rets = similar.answer(pair("5.png", "5.jpg"), pair("5.png", "7.png"), pair("3.png", "3.png"))
    assert [ret["code"] for ret in rets] == [0, 0, 0]
    fives, others, itself = (ret["result"]["similarity"] for ret in rets)
    assert fives > 0.7 > 0.5 > others
    assert itself == pytest.approx(1, abs=1e-6)


def test_similarity_is_the_cosine_of_the_streamed_embeddings(similar: Script) -> None:
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
def test_anything_but_a_group_of_two_is_refused_alone(similar: Script, req: dict[str, Any]) -> None:
    refused, answered = similar.answer(req, pair("1.png", "1.png"))
    assert refused["code"] == 400
    assert refused["message"]
    assert answered["code"] == 0
    assert similar.answer(req)[0]["code"] == 400
