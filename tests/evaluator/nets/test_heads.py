"""The detector reads nets that end in grids of anchors. The nets are small, so that tests can calculate the boxes."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from evaluator.nets import detect, heads
from tests.caffe.nets import input_layer, layer, normal
from tests.evaluator.built_in import Array, config, evaluate, files, loaded, start_error, with_outputs

from .head_nets import (
    HEIGHT,
    RETINAFACE,
    RETINAFACE_HEAD,
    RETINAFACE_WEIGHTS,
    WIDTH,
    YOLO,
    YOLO_HEAD,
    YOLO_WEIGHTS,
    grid,
    picture,
)


def boxes(ret: dict[str, Any]) -> list[tuple[int, list[int]]]:
    assert (ret["code"], ret["message"]) == (0, "")
    return [(each["index"], each["pts"][0] + each["pts"][2]) for each in ret["result"]["detections"]]


@pytest.fixture(scope="module")
def yolo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return files(tmp_path_factory.mktemp("yolo"), YOLO, YOLO_WEIGHTS, "0,red\n1,blue\n")


def test_yolo_box_follows_its_cell_its_anchor_and_its_moves(yolo: dict[str, Path]) -> None:
    model = loaded("detect", config(yolo, head=YOLO_HEAD))
    # The cell's centre is (40, 24); the box is moved by a quarter of 16 pixels to x = 44, and is 8 wide and 16 high.
    blue, red, none = evaluate(model, (picture((1, 2, 0)), None), (picture((3, 6, 2), stride=8), {}), (picture(), None))
    assert boxes(blue) == [(1, [40, 16, 48, 31])]
    assert boxes(red) == [(0, [48, 24, 56, 31])]
    assert [each["class"] for ret in (blue, red) for each in ret["result"]["detections"]] == ["blue", "red"]
    assert none["result"] == {"detections": []}


def test_yolo_score_is_objectness_times_class_score(tmp_path: Path) -> None:
    net = input_layer(1, 3, HEIGHT, WIDTH) + grid(32, 6, "out")
    weights = {"out": [np.zeros((6, 3, 1, 1)), np.array([0, 0, 0, 0, np.log(4), np.log(3)])]}
    head = {"kind": "yolo", "levels": [{"output": "out", "stride": 32, "anchors": [[4, 4]]}]}
    (ret,) = evaluate(loaded("detect", config(files(tmp_path, net, weights), head=head)), (picture(), None))
    assert [each["score"] for each in ret["result"]["detections"]] == pytest.approx([0.8 * 0.75] * 2)


def test_boxes_are_scaled_and_clipped_to_the_image(yolo: dict[str, Path]) -> None:
    model = loaded("detect", config(yolo, head=YOLO_HEAD))
    (ret,) = evaluate(model, (cv2.resize(picture((0, 3, 0)), (640, 96)), None))
    # (56 + 4 - 4, 8 - 8) to (64, 16) of 64x32.
    assert boxes(ret) == [(1, [560, 0, 639, 48])]


def test_retinaface_box_follows_its_cell_its_anchor_and_its_moves(tmp_path: Path) -> None:
    model = loaded("detect", config(files(tmp_path, RETINAFACE, RETINAFACE_WEIGHTS), head=RETINAFACE_HEAD))
    red, blue = evaluate(model, (picture((1, 2, 2)), None), (picture((0, 1, 0)), None))
    assert boxes(red) == [(1, [32, 16, 48, 31])]
    # (24 + 0.5 x 8, 8 - 0.25 x 8), 4 wide and 12 high.
    assert boxes(blue) == [(1, [26, 0, 30, 12])]


def test_first_anchors_of_retinaface_are_centred_at_8_pixels_for_any_stride(tmp_path: Path) -> None:
    weights = {
        "score": [np.zeros((2, 3, 1, 1)), np.array([0.1, 0.9])],
        "boxes": [np.zeros((4, 3, 1, 1)), np.zeros(4)],
    }
    net = input_layer(1, 3, HEIGHT, WIDTH) + grid(32, 2, "score") + grid(32, 4, "boxes")
    level = {"scores": "score", "boxes": "boxes", "stride": 32, "anchors": [[12, 8]]}
    model = loaded("detect", config(files(tmp_path, net, weights), head={"kind": "retinaface", "levels": [level]}))
    (ret,) = evaluate(model, (picture(), None))
    assert sorted(boxes(ret)) == [(1, [2, 4, 14, 12]), (1, [34, 4, 46, 12])]


def test_retinaface_boxes_come_from_every_grid(tmp_path: Path) -> None:
    net = input_layer(1, 3, HEIGHT, WIDTH)
    weights: dict[str, list[Array]] = {}
    levels = []
    for stride, colour in ((16, 2), (8, 0)):
        scores, boxes_ = f"scores{stride}", f"boxes{stride}"
        net += grid(stride, 2, scores) + grid(stride, 4, boxes_)
        sure = np.zeros((2, 3, 1, 1))
        sure[1, colour] = 0.9 / 255
        weights |= {scores: [sure, np.zeros(2)], boxes_: [np.zeros((4, 3, 1, 1)), np.zeros(4)]}
        levels.append({"scores": scores, "boxes": boxes_, "stride": stride, "anchors": [[stride, stride]]})
    model = loaded("detect", config(files(tmp_path, net, weights), head={"kind": "retinaface", "levels": levels}))
    red_and_blue = picture((1, 2, 2)) + picture((0, 1, 0), stride=8)
    (ret,) = evaluate(model, (red_and_blue, None))
    assert sorted(boxes(ret)) == [(1, [12, 4, 20, 12]), (1, [32, 16, 48, 31])]


def by_anchor(blob: str, numbers: int) -> str:
    """Return layers that reshape a grid's values to (anchors, values), in the order of an SSD."""
    order = "permute_param { order: 0 order: 2 order: 3 order: 1 }"
    shape = f"reshape_param {{ shape {{ dim: 0 dim: -1 dim: {numbers} }} }}"
    last, rows = f"{blob}_last", f"{blob}_rows"
    return layer("Permute", blob, last, order, last) + layer("Reshape", last, rows, shape, rows)


def prior_box(grid: str, size: int) -> str:
    priors = f"{grid}_priors"
    variances = "variance: 0.1 variance: 0.1 variance: 0.2 variance: 0.2"
    parameters = f"prior_box_param {{ min_size: {size} aspect_ratio: 4 flip: false {variances} }}"
    return layer("PriorBox", f"{grid}_conf data", priors, parameters, priors)


# An SSD of two grids, first without and then with the layers that decode its boxes.
SSD = (
    input_layer(1, 3, HEIGHT, WIDTH)
    + "".join(grid(stride, 6, f"{name}_conf") + by_anchor(f"{name}_conf", 3) for name, stride in (("a", 8), ("b", 16)))
    + "".join(grid(stride, 8, f"{name}_loc") + by_anchor(f"{name}_loc", 4) for name, stride in (("a", 8), ("b", 16)))
    + layer("Concat", "a_conf_rows b_conf_rows", "conf", "concat_param { axis: 1 }", "conf")
    + layer("Concat", "a_loc_rows b_loc_rows", "boxes", "concat_param { axis: 1 }", "boxes")
    + layer("Softmax", "conf", "scores", "softmax_param { axis: 2 }")
)
SSD_ROWS = (
    SSD
    + layer("Flatten", "scores", "scores_flat", name="scores_flat")
    + layer("Flatten", "boxes", "boxes_flat", name="boxes_flat")
    + prior_box("a", 10)
    + prior_box("b", 20)
    + layer("Concat", "a_priors b_priors", "priors", "concat_param { axis: 2 }", "priors")
    + layer(
        "DetectionOutput",
        "boxes_flat scores_flat priors",
        "detections",
        "detection_output_param { num_classes: 3 nms_param { nms_threshold: 0.3 top_k: 400 } "
        "keep_top_k: 400 code_type: CENTER_SIZE confidence_threshold: 0.01 }",
    )
)
SSD_HEAD: dict[str, Any] = {
    "kind": "ssd",
    "scores": "scores",
    "boxes": "boxes",
    "nms_threshold": 0.3,
    "levels": [{"stride": 8, "anchors": [[10, 10], [20, 5]]}, {"stride": 16, "anchors": [[20, 20], [40, 10]]}],
}


def ssd_weights() -> dict[str, list[Array]]:
    return {
        f"{name}_{kind}": [normal(channels, 3, 1, 1, seed=seed) * 0.01, normal(channels, seed=seed + 9)]
        for seed, (name, kind, channels) in enumerate(
            [("a", "conf", 6), ("a", "loc", 8), ("b", "conf", 6), ("b", "loc", 8)]
        )
    }


def test_ssd_head_gives_the_boxes_of_a_detection_output_of_the_same_net(tmp_path: Path) -> None:
    head = loaded("detect", config(files(tmp_path / "head", SSD, ssd_weights()), head=SSD_HEAD, threshold=0.3))
    rows = loaded("detect", config(files(tmp_path / "rows", SSD_ROWS, ssd_weights()), threshold=0.3))
    images = [
        (np.random.default_rng(seed).integers(0, 255, (HEIGHT, WIDTH, 3)).astype(np.uint8), None) for seed in range(3)
    ]
    for ours, reference in zip(evaluate(head, *images), evaluate(rows, *images), strict=True):
        expected = reference["result"]["detections"]
        assert len(expected) > 10
        assert {each["index"] for each in expected} == {1, 2}
        assert boxes(ours) == boxes(reference)
        np.testing.assert_allclose(
            [each["score"] for each in ours["result"]["detections"]], [each["score"] for each in expected], rtol=1e-5
        )


def overlapping_boxes(tmp_path: Path, moves: list[float], nms_threshold: float) -> list[tuple[int, list[int]]]:
    """Return the boxes of a YOLO with one anchor of 24x16 in each cell; every anchor scores high in two classes."""
    net = input_layer(1, 3, HEIGHT, WIDTH) + grid(16, 7, "out")
    weights = {"out": [np.zeros((7, 3, 1, 1)), np.array([*moves, 9, 9, 9])]}
    head = {"kind": "yolo", "levels": [{"output": "out", "stride": 16, "anchors": [[24, 16]]}]}
    release = config(files(tmp_path, net, weights), head={**head, "nms_threshold": nms_threshold})
    return boxes(evaluate(loaded("detect", release), (picture(), None))[0])


def test_overlapping_boxes_of_a_class_are_suppressed(tmp_path: Path) -> None:
    # Neighbours share 8 of 40 columns, a fifth of their union.
    apart, together = (overlapping_boxes(tmp_path, [0, 0, 0, 0], threshold) for threshold in (0.21, 0.19))
    assert [len(apart), len(together)] == [16, 8]
    assert {each for each, _ in together} == {0, 1}


def test_huge_moves_give_boxes_inside_the_image_or_none(tmp_path: Path) -> None:
    found = overlapping_boxes(tmp_path, [0, 0, 1e30, 1e30], 1.0)
    assert found == [(label, [0, 0, WIDTH - 1, HEIGHT - 1]) for label, _ in found]
    assert overlapping_boxes(tmp_path, [-1e30, 1e30, -1e30, -1e30], 1.0) == []


def yolo_head(folder: Path, size: int) -> tuple[heads.Head, dict[str, Array]]:
    """Return a head of one grid of ``size`` x ``size`` cells and one class, and low-scored outputs of two images."""
    net = input_layer(1, 3, size * 8, size * 8) + grid(8, 6, "out")
    head = {"kind": "yolo", "nms_threshold": 1.0, "levels": [{"output": "out", "stride": 8, "anchors": [[8, 8]]}]}
    model = loaded("detect", config(files(folder, net), head=head))
    assert isinstance(model, detect.Detect)
    assert isinstance(model.head, heads.Head)
    return model.head, {"out": np.full((2, 6, size, size), -9.0, np.float32)}


def test_thousand_highest_scored_boxes_of_an_image_are_read(tmp_path: Path) -> None:
    head, outputs = yolo_head(tmp_path, 100)
    outputs["out"][1] = np.random.default_rng(1).normal(0, 1, (6, 100, 100))
    rows = head.rows(outputs, 1, 0.0)
    numbers = outputs["out"][1, 4:].astype(np.float64)
    scores = np.sort((1 / (1 + np.exp(-numbers))).prod(axis=0).ravel())[::-1]
    assert len(rows) == heads.CANDIDATES == 1000
    np.testing.assert_allclose(np.sort(rows[:, 1])[::-1], scores[:1000], rtol=1e-5)


def many_classes(scores: Array) -> tuple[heads.Head, dict[str, Array]]:
    """Return a head for scores (anchors, classes), whose boxes do not overlap, and its outputs."""
    count = len(scores)
    centre = np.arange(count, dtype=np.float64)
    priors = np.column_stack([centre, centre, np.full((count, 2), 0.5), np.ones(count)])
    head = heads.Head(
        outputs=["scores"],
        split=lambda outputs: (outputs[0], np.zeros((count, 4), np.float32)),
        decode=lambda _, priors: (priors[:, :2], priors[:, 2:4]),
        priors=priors,
        size=(1000, 1000),
        nms_threshold=1.0,
        first_class=0,
    )
    return head, {"scores": scores[np.newaxis]}


def peak_bytes(head: heads.Head, outputs: dict[str, Array], threshold: float) -> int:
    tracemalloc.start()
    head.rows(outputs, 0, threshold)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_the_best_boxes_of_very_many_are_read_whatever_the_threshold() -> None:
    scores = np.random.default_rng(1).permutation(30_000 * 40).reshape(30_000, 40).astype(np.float32) / 1_200_000
    head, outputs = many_classes(scores)
    best = np.sort(scores.ravel())[::-1]
    for threshold, count in ((0.0, 1000), (float(best[499]), 500), (1.0, 0)):
        np.testing.assert_array_equal(np.sort(head.rows(outputs, 0, threshold)[:, 1])[::-1], best[:count])
    # A caller chooses the threshold: it must not choose the memory.
    assert peak_bytes(head, outputs, 0.0) < 2 * scores.nbytes
    scores[7, 3] = np.nan
    assert np.isnan(head.rows(outputs, 0, 0.5)).any()


@pytest.mark.parametrize("channel", range(6))
def test_value_that_is_not_finite_fails_only_its_own_image(channel: int, tmp_path: Path) -> None:
    head, outputs = yolo_head(tmp_path, 40)
    outputs["out"][1, 4:, 5, 7] = 9
    outputs["out"][1, channel, 5, 7] = np.nan
    net = with_outputs("detect", outputs, head=head)
    # With a threshold of 0 many other boxes pass as well.
    for threshold in (0.1, 0.0):
        rets = net.infer("r", [detect.Input(np.zeros((2, 2, 3), np.uint8), (320, 320), threshold)] * 2)
        assert [ret["code"] for ret in rets] == [0, 500]


COARSE, FINE = YOLO_HEAD["levels"]


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("yolo", "custom_values.head is 'yolo', should be an object"),
        (None, "custom_values.head is None, should be an object"),
        ({}, "custom_values.head.kind is None, should be one of: yolo, retinaface, ssd"),
        ({"kind": ["yolo"]}, "custom_values.head.kind is ['yolo'], should be one of"),
        ({"kind": "yolo"}, "custom_values.head.levels is None, should be a list of objects"),
        ({"kind": "yolo", "levels": []}, "custom_values.head.levels is [], should be a list of objects"),
        ({"kind": "yolo", "levels": [5]}, "custom_values.head.levels is [5], should be a list of objects"),
        ({**YOLO_HEAD, "nms": 1}, "custom_values.head.nms is not known; known are: kind, levels, nms_threshold"),
        ({**YOLO_HEAD, "nms_threshold": 1.1}, "custom_values.head.nms_threshold is 1.1, should be 0 to 1"),
        ({**YOLO_HEAD, "nms_threshold": True}, "custom_values.head.nms_threshold is True, should be a finite number"),
        (
            {"kind": "yolo", "levels": [COARSE, {**FINE, "scores": "x"}]},
            "custom_values.head.levels[1].scores is not known; known are: stride, anchors, output",
        ),
        (
            {"kind": "yolo", "levels": [{**COARSE, "output": "data"}]},
            "custom_values.head.levels[0].output is 'data', should be one of: coarse, fine",
        ),
        (
            {"kind": "yolo", "levels": [{**COARSE, "stride": 16.0}]},
            "custom_values.head.levels[0].stride is 16.0, should be a positive integer",
        ),
        (
            {"kind": "yolo", "levels": [{"output": "coarse", "anchors": [[1, 1]]}]},
            "custom_values.head.levels[0].stride is None, should be a positive integer",
        ),
        (
            {"kind": "yolo", "levels": [{**COARSE, "anchors": [[8, 8], [8]]}]},
            "custom_values.head.levels[0].anchors is [[8, 8], [8]], should be a list of [width, height]",
        ),
        (
            {"kind": "yolo", "levels": [{**COARSE, "anchors": [[8, 0]]}]},
            "custom_values.head.levels[0].anchors is [[8, 0]], should be a list of [width, height]",
        ),
        (
            {"kind": "yolo", "levels": [{**COARSE, "stride": 8}]},
            "custom_values.head.levels[0].output is 'coarse', should be an output of shape (14, 4, 8), not (14, 2, 4)",
        ),
        (
            {"kind": "yolo", "levels": [{**COARSE, "anchors": [[8, 8]] * 3}]},
            "custom_values.head.levels[0].output is 'coarse', should be an output of shape (18, 2, 4), not (14, 2, 4)",
        ),
        (
            {"kind": "yolo", "levels": [COARSE, {**FINE, "anchors": [[8, 8]]}]},
            "custom_values.head.levels[1].output is 'fine', should be an output of shape (7, 4, 8), not (14, 4, 8)",
        ),
    ],
)
def test_malformed_head_fails_to_load(yolo: dict[str, Path], head: Any, message: str) -> None:
    assert message in start_error("detect", config(yolo, head=head))


def test_output_without_a_grid_is_refused_as_a_level(tmp_path: Path) -> None:
    net = files(tmp_path, YOLO + layer("Reduction", "data", "sum", "reduction_param { axis: 1 }"))
    head = {"kind": "yolo", "levels": [{**COARSE, "output": "sum"}]}
    assert "should be an output of shape (12, 2, 4), not ()" in start_error("detect", config(net, head=head))


def test_retinaface_head_must_fit_its_net(tmp_path: Path) -> None:
    net = files(tmp_path, RETINAFACE, RETINAFACE_WEIGHTS)
    (level,) = RETINAFACE_HEAD["levels"]
    for changed, message in (
        (
            {"scores": "boxes", "boxes": "scores"},
            "boxes is 'scores', should be an output of shape (8, 2, 4), not (4, 2, 4)",
        ),
        ({"anchors": [[8, 8]]}, "boxes is 'boxes', should be an output of shape (4, 2, 4), not (8, 2, 4)"),
        ({"boxes": "score"}, "boxes is 'score', should be one of: scores, boxes"),
    ):
        error = start_error("detect", config(net, head={**RETINAFACE_HEAD, "levels": [{**level, **changed}]}))
        assert f"custom_values.head.levels[0].{message}" in error


def test_ssd_head_must_fit_its_net(tmp_path: Path) -> None:
    net = files(tmp_path, SSD, ssd_weights())
    fine, coarse = SSD_HEAD["levels"]
    for changed, message in (
        (
            {"levels": [fine]},
            "scores is 'scores', should be an output of shape (64, classes), the background among them,",
        ),
        (
            {"scores": "boxes", "boxes": "scores"},
            "boxes is 'scores', should be an output of shape (80, 4), not (80, 3)",
        ),
        ({"levels": [{**fine, "output": "a"}, coarse]}, "levels[0].output is not known; known are: stride, anchors"),
        ({"variances": [0.1]}, "variances is [0.1], should be two numbers, of the centre and of the size"),
        ({"variances": "x"}, "variances is 'x', should be a finite number or a list of them"),
    ):
        assert f"custom_values.head.{message}" in start_error("detect", config(net, head={**SSD_HEAD, **changed}))
