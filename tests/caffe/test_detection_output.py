"""DetectionOutput matches SSD's definition in plain NumPy, and OpenCV."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from evaluator.caffe import convert

from .boxes import overlap, rows
from .nets import Array, error, input_layer, layer, run, write_net
from .oracle import opencv_outputs


@dataclass(frozen=True)
class Case:
    """The parameters of a DetectionOutput layer; `overlap` is nms_threshold and `threshold` confidence_threshold."""

    classes: int = 4
    shared: bool = True
    background: int = 0
    overlap: float = 0.45
    top_k: int = -1
    keep_top_k: int = -1
    threshold: float | None = 0.3
    code: str = "CENTER_SIZE"
    in_target: bool = False

    def prototxt(self, priors: int) -> str:
        locations = 4 if self.shared else 4 * self.classes
        threshold = "" if self.threshold is None else f"confidence_threshold: {self.threshold}"
        return (
            input_layer(1, priors * locations, name="loc")
            + input_layer(1, priors * self.classes, name="conf")
            + input_layer(1, 2, priors * 4, name="priors")
            + layer(
                "DetectionOutput",
                "loc conf priors",
                more=f"""detection_output_param {{ num_classes: {self.classes}
                share_location: {str(self.shared).lower()}
                background_label_id: {self.background} nms_param {{ nms_threshold: {self.overlap} top_k: {self.top_k} }}
                code_type: {self.code} keep_top_k: {self.keep_top_k} {threshold}
                variance_encoded_in_target: {str(self.in_target).lower()} }}""",
            )
        )


def decode(case: Case, location: Array, prior: Array, variance: Array) -> Array:
    delta = location if case.in_target else location * variance
    size = prior[2:] - prior[:2]
    if case.code == "CORNER":
        box: Array = prior + delta
    elif case.code == "CORNER_SIZE":
        box = prior + delta * np.tile(size, 2)
    else:
        centre = (prior[:2] + prior[2:]) / 2 + delta[:2] * size
        half = np.exp(delta[2:]) * size / 2
        box = np.concatenate([centre - half, centre + half])
    return box


def area(box: Array) -> float:
    return float(np.prod(np.maximum(box[2:] - box[:2], 0)))


def jaccard(a: Array, b: Array) -> float:
    return overlap(a, b, 0) if area(a) > 0 and area(b) > 0 else 0.0


def detected(case: Case, loc: Array, conf: Array, priors: Array) -> Array:
    """Return the rows of a batch as SSD's detection_output_layer.cpp computes them."""
    number = priors.shape[1] // 4
    table: list[list[float]] = []
    for image in range(len(loc)):
        locations = loc[image].reshape(number, -1, 4)
        scores = conf[image].reshape(number, case.classes)
        found: list[tuple[float, int, Array]] = []
        for label in range(case.classes):
            if label == case.background:
                continue
            best = [p for p in np.argsort(-scores[:, label], kind="stable") if passes(case, scores[p, label])]
            kept: list[Array] = []
            for p in best[: case.top_k if case.top_k > -1 else None]:
                at = slice(4 * p, 4 * p + 4)
                box = decode(case, locations[p, 0 if case.shared else label], priors[0, at], priors[1, at])
                if all(jaccard(box, other) <= case.overlap for other in kept):
                    kept.append(box)
                    found.append((scores[p, label], label, box))
        if -1 < case.keep_top_k < len(found):
            found = sorted(found, key=lambda one: -one[0])[: case.keep_top_k]
        table += [[image, label, score, *box] for score, label, box in sorted(found, key=lambda one: (one[1], -one[0]))]
    return np.array(table, np.float32).reshape(1, 1, -1, 7)


def passes(case: Case, score: float) -> bool:
    return case.threshold is None or bool(score > np.float32(case.threshold))


def draw(case: Case, images: int, priors: int) -> dict[str, Array]:
    random = np.random.default_rng(13)
    centres, half = random.uniform(0.2, 0.8, (priors, 2)), random.uniform(0.05, 0.3, (priors, 2))
    boxes = np.concatenate([centres - half, centres + half], axis=1).reshape(-1)
    variances = np.tile([0.1, 0.1, 0.2, 0.2], priors)
    logits = random.normal(0, 2, (images, priors, case.classes))
    scores = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    width = 4 if case.shared else 4 * case.classes
    feeds = {
        "loc": random.normal(0, 1, (images, priors * width)),
        "conf": scores.reshape(images, -1),
        "priors": np.broadcast_to(np.stack([boxes, variances]), (images, 2, priors * 4)),
    }
    return {name: np.ascontiguousarray(array, np.float32) for name, array in feeds.items()}


CASES = {
    "plain": Case(),
    "top_k": Case(top_k=10),
    "keep_top_k": Case(keep_top_k=7),
    "both": Case(top_k=12, keep_top_k=9, overlap=0.2),
    "limits above the number of candidates": Case(top_k=5000, keep_top_k=5000),
    "not shared": Case(shared=False, top_k=15),
    "corner": Case(code="CORNER", overlap=0.1),
    "corner size": Case(code="CORNER_SIZE", keep_top_k=20),
    "corner not shared": Case(code="CORNER", shared=False, keep_top_k=20),
    "variance in target": Case(in_target=True, overlap=0.3),
    "no background": Case(background=-1, keep_top_k=30),
    "last is background": Case(background=3),
    "no threshold": Case(threshold=None, top_k=5),
    "one class": Case(classes=2, keep_top_k=5),
    "corner keep": Case(code="CORNER", overlap=0.1, keep_top_k=10),
    "not shared keep": Case(shared=False, top_k=15, keep_top_k=10),
    "never suppressed": Case(overlap=1.5),
}


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_match_ssd(case: Case, images: int, tmp_path: Path) -> None:
    model = convert(*write_net(tmp_path, case.prototxt(60), {}))
    feeds = draw(case, images, 60)
    expected = detected(case, feeds["loc"], feeds["conf"], feeds["priors"][0])
    assert expected.shape[2] > 0
    assert error(run(model, feeds)["out"], expected) < 1e-5


@pytest.mark.parametrize("name", ["keep_top_k", "both", "corner keep", "not shared keep", "one class"])
def test_rows_match_opencv(name: str, tmp_path: Path) -> None:
    # All cases have a keep_top_k: without one, OpenCV 4.14 writes outside its memory.
    case = CASES[name]
    prototxt = case.prototxt(60)
    feeds = draw(case, 1, 60)
    theirs = opencv_outputs(tmp_path, prototxt, {}, feeds, ["out"])["out"]
    ours = run(convert(*write_net(tmp_path, prototxt, {})), feeds)["out"]
    assert error(rows(ours), rows(theirs)) < 1e-5


def test_image_without_detections_has_no_rows(tmp_path: Path) -> None:
    case = Case(threshold=1.1)
    model = convert(*write_net(tmp_path, case.prototxt(60), {}))
    assert run(model, draw(case, 2, 60))["out"].shape == (1, 1, 0, 7)
    second_image_only = draw(Case(), 2, 60)
    second_image_only["conf"][0] = 0
    model = convert(*write_net(tmp_path, Case().prototxt(60), {}))
    assert set(run(model, second_image_only)["out"][0, 0, :, 0]) == {1.0}
