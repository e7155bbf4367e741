"""The built-in segmenter, tested with small nets made here: score maps, label maps, regions and colours."""

from __future__ import annotations

import base64
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atserving.errors import InvalidArgument
from evaluator.net_contract import Ret
from evaluator.nets import effort, enlarging, outlines, segment
from evaluator.nets.effort import Effort
from evaluator.nets.image_input import ImageNet
from evaluator.nets.label_map import LabelMap
from evaluator.nets.palette import palette
from evaluator.runtime.preprocessing import Geometry
from tests.caffe.nets import input_layer, layer
from tests.evaluator import built_in
from tests.evaluator.built_in import Array, config, files, loaded, start_error, with_outputs
from tests.evaluator.nets import plain_segment

# Halves the size and doubles it again. Class 1 is blue, class 2 red, any other colour is background.
SCORES = (
    input_layer(1, 3, 32, 32)
    + layer("Convolution", "data", "small", "convolution_param { num_output: 3 kernel_size: 2 stride: 2 }", "small")
    + layer(
        "Deconvolution",
        "small",
        "scores",
        "convolution_param { num_output: 3 group: 3 kernel_size: 2 stride: 2 bias_term: false }",
        "large",
    )
)
PROBABILITIES = SCORES + layer("Softmax", "scores", "prob")
LABELS = SCORES + layer("ArgMax", "scores", "labels", "argmax_param { axis: 1 }")
_QUARTER = np.full((1, 1, 2, 2), 0.25)
WEIGHTS = {
    "small": [
        np.concatenate([np.zeros((1, 3, 2, 2)), *(np.eye(3)[c].reshape(1, 3, 1, 1) * _QUARTER for c in (0, 2))]) * 0.1,
        np.array([10.0, 0, 0]),
    ],
    "large": [np.ones((3, 1, 2, 2))],
}
BLUE, RED = (255, 0, 0), (0, 0, 255)


@pytest.fixture(scope="module", params=[SCORES, PROBABILITIES, LABELS], ids=["scores", "probabilities", "labels"])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return files(tmp_path_factory.mktemp("segment"), request.param, WEIGHTS, "0,sky\n1,water\n")


def picture() -> Array:
    """Return an image 128 wide and 64 high with two blue rectangles, far from each other, and a red one."""
    image = np.zeros((64, 128, 3), np.uint8)
    image[8:24, 16:48] = BLUE
    image[32:56, 64:96] = RED
    image[8:16, 104:120] = BLUE
    return image


def evaluate(net: ImageNet, *requests: tuple[Array, Any]) -> list[Ret]:
    """Return the rets of a batch of images, as callers get them."""
    return sent(built_in.evaluate(net, *requests))


def sent(rets: list[Ret]) -> list[Ret]:
    result: list[Ret] = orjson.loads(orjson.dumps(rets, option=orjson.OPT_SERIALIZE_NUMPY))
    return result


def mask(ret: dict[str, Any]) -> Array:
    """Return the mask of a ret as (height, width, 3): red, green and blue."""
    head, _, data = ret["result"]["mask"].partition(",")
    assert head == "data:image/png;base64"
    decoded = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    return decoded[:, :, ::-1]


def test_result_has_the_fields_of_the_contract(release: dict[str, Path]) -> None:
    (ret,) = evaluate(loaded("segment", config(release)), (picture(), None))
    assert (ret["code"], list(ret["result"])) == (0, ["mask", "detections"])
    found = ret["result"]["detections"]
    assert len(found) == 3
    assert all(list(each) == ["index", "class", "color", "pts", "score"] for each in found)
    assert sorted(each["class"] for each in found) == ["2", "water", "water"]
    assert {each["index"]: each["color"] for each in found} == {1: [128, 0, 0], 2: [0, 128, 0]}
    assert all(0.5 < each["score"] <= 1 for each in found)
    scores = [each["score"] for each in found]
    assert scores == sorted(scores, reverse=True)


def test_mask_has_the_size_of_the_image_and_the_colours_of_the_classes(release: dict[str, Path]) -> None:
    (ret,) = evaluate(loaded("segment", config(release)), (picture(), {}))
    colours = mask(ret)
    assert colours.shape == (64, 128, 3)
    expected = np.zeros_like(colours)
    expected[(picture() == BLUE).all(axis=2)] = (128, 0, 0)
    expected[(picture() == RED).all(axis=2)] = (0, 128, 0)
    # Borders may move by a pixel of the net's output, or four pixels of the image.
    assert (colours == expected).all(axis=2).mean() > 0.95
    assert {tuple(colour) for colour in colours.reshape(-1, 3).tolist()} == {(0, 0, 0), (128, 0, 0), (0, 128, 0)}


def test_outline_consists_of_pixels_of_its_region(release: dict[str, Path]) -> None:
    (ret,) = evaluate(loaded("segment", config(release)), (picture(), None))
    colours = mask(ret)
    for each in ret["result"]["detections"]:
        assert all(type(number) is int for point in each["pts"] for number in point)
        assert all(colours[y, x].tolist() == each["color"] for x, y in each["pts"])
    (red,) = (each for each in ret["result"]["detections"] if each["index"] == 2)
    left, top, width, height = cv2.boundingRect(np.array(red["pts"]))
    np.testing.assert_allclose([left, top, width, height], [64, 32, 32, 24], atol=4)


def test_each_request_of_a_batch_gets_its_own_result(release: dict[str, Path]) -> None:
    model = loaded("segment", config(release))
    empty, full = evaluate(model, (np.zeros((10, 20, 3)), None), (np.full((30, 10, 3), RED), None))
    assert empty["result"]["detections"] == []
    assert (mask(empty).shape, mask(empty).max()) == ((10, 20, 3), 0)
    (everything,) = full["result"]["detections"]
    assert everything["pts"] == [[0, 0], [0, 29], [9, 29], [9, 0]]


def test_margin_outside_the_cropped_input_is_background(release: dict[str, Path]) -> None:
    model = loaded("segment", config(release, image_width=64))
    (ret,) = evaluate(model, (np.full((64, 128, 3), RED), None))
    (region,) = ret["result"]["detections"]
    assert region["pts"] == [[32, 16], [32, 47], [95, 47], [95, 16]]


def test_release_chooses_the_colours_and_the_background(release: dict[str, Path]) -> None:
    model = loaded("segment", config(release, colors=[[1, 2, 3], [4, 5, 6]], background=1))
    (ret,) = evaluate(model, (picture(), None))
    assert mask(ret)[0, 0].tolist() == [1, 2, 3]
    assert {each["index"]: each["color"] for each in ret["result"]["detections"]} == {0: [1, 2, 3], 2: [0, 128, 0]}
    every = loaded("segment", config(release, background=-1))
    (ret,) = evaluate(every, (picture(), None))
    assert {each["index"] for each in ret["result"]["detections"]} == {0, 1, 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"colors": "red"}, "custom_values.colors should be a list of at most 256 [red, green, blue], 0 to 255"),
        ({"colors": [[0, 0, 256]]}, "custom_values.colors should be"),
        ({"colors": [[0, 0]]}, "custom_values.colors should be"),
        ({"background": "sky"}, "custom_values.background is 'sky', should be an integer"),
        ({"background": -2}, "custom_values.background is -2, should be the index of a class, or -1 for none"),
    ],
)
def test_wrong_custom_values_fail_to_load(release: dict[str, Path], fields: dict[str, Any], message: str) -> None:
    assert message in start_error("segment", config(release, **fields))


def test_net_without_a_map_does_not_load(tmp_path: Path) -> None:
    net = files(tmp_path, input_layer(1, 3, 4, 4) + layer("Flatten", tops="flat"))
    assert "'flat' is none" in start_error("segment", config(net))


def test_group_is_refused(release: dict[str, Path]) -> None:
    with pytest.raises(InvalidArgument, match="segment takes one image, not a list of them"):
        loaded("segment", config(release)).preprocess({"data": [{"body": b""}] * 2})


def of_map(output: Array, size: tuple[int, int] | None = None, **attributes: Any) -> Ret:
    """Return the ret for a net's output, for an image of that width and height, or of the output's size."""
    net = with_outputs("segment", {"out": output[np.newaxis]}, **attributes)
    pixels = np.zeros((2, 2, 3), np.uint8)
    (ret,) = sent(net.infer("r", [segment.Input(pixels, size or (output.shape[-1], output.shape[-2]))]))
    return ret


def test_pixels_that_touch_at_corners_are_one_region_and_an_island_is_another() -> None:
    labels = np.zeros((9, 9))
    labels[0:7, 0:7] = 1
    labels[1:6, 1:6] = 0
    labels[3, 3] = 1  # an island in the lake
    labels[7, 7] = labels[8, 8] = 1  # touches at corners
    found = of_map(labels)["result"]["detections"]
    assert sorted(len(each["pts"]) for each in found) == [1, 6]
    assert [[3, 3]] in [each["pts"] for each in found]
    assert [each["score"] for each in found] == [1.0, 1.0]


def test_score_of_a_region_is_the_mean_over_its_pixels() -> None:
    scores = np.zeros((2, 2, 4))
    scores[1] = [[0.9, 0.7, 0.2, 0.6], [0.9, 0.7, 0.2, 0.6]]
    scores[0] = 1 - scores[1]
    found = of_map(scores)["result"]["detections"]
    assert [round(each["score"], 4) for each in found] == [0.8, 0.6]
    # The segmenter applies a softmax to scores whose sum is not one.
    found = of_map(np.stack([np.zeros((2, 2)), np.full((2, 2), np.log(3))]))["result"]["detections"]
    assert [round(each["score"], 4) for each in found] == [0.75]


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    input_size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    margin=st.integers(0, 40),
    classes=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_mask_and_outlines_fit_images_of_any_size(
    size: tuple[int, int], input_size: tuple[int, int], margin: int, classes: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    shape = (classes, *random.integers(1, 9, 2))
    output = random.normal(0, 3, shape) if classes > 1 else random.integers(0, 4, shape)
    geometry = Geometry((3, *input_size), input_size[1] + margin)
    ret = of_map(output, size=size, geometry=geometry, _background=int(random.integers(-1, 2)))
    colours = mask(ret)
    assert colours.shape == (size[1], size[0], 3)
    for each in ret["result"]["detections"]:
        assert all(0 <= x < size[0] and 0 <= y < size[1] for x, y in each["pts"])
        assert all(colours[y, x].tolist() == each["color"] for x, y in each["pts"])
        assert 0 <= each["score"] <= 1


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_regions_are_those_of_each_class_on_its_own(data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    height, width, classes, scale = (int(random.integers(1, most)) for most in (30, 30, 6, 4))
    small = random.integers(0, classes, (-(-height // scale), -(-width // scale)), np.uint16)
    labels = np.repeat(np.repeat(small, scale, 0), scale, 1)[:height, :width]
    scores = random.random(labels.shape, np.float32) if random.random() < 0.5 else None
    background, most, rows = int(random.integers(-1, 2)), int(random.integers(1, 40)), int(random.integers(1, 30))
    label_map = LabelMap(width, background, Effort())
    for start in range(0, height, rows):
        part = slice(start, start + rows)
        label_map.add(labels[part], None if scores is None else scores[part])
    regions = label_map.largest(most)
    pts = outlines.outlines(regions, Effort())
    order = np.argsort(-regions.scores, kind="stable").tolist()
    expected = plain_segment.regions(labels, scores, background, most)
    found = [(int(regions.indices[each]), int(regions.areas[each]), pts[each].tolist()) for each in order]
    # Sums of scores may differ in their last digit, and with them the order of equal means.
    assert sorted(found) == sorted((index, area, outline) for index, area, _, outline in expected)
    np.testing.assert_allclose(regions.scores[order], [score for _, _, score, _ in expected], rtol=1e-6)
    assert (label_map.paint(np.arange(256, dtype=np.uint8)[:, np.newaxis])[:, :, 0] == labels).all()


@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    shape=st.tuples(st.integers(2, 9), st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_each_pixel_has_the_class_whose_interpolated_score_is_the_highest(
    size: tuple[int, int], shape: tuple[int, int, int], seed: int
) -> None:
    scores = segment.probabilities(np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32))
    blocks = list(enlarging.likeliest(scores, size, Effort()))
    labels, best = plain_segment.likeliest(scores, size)
    np.testing.assert_allclose(np.concatenate([block[1] for block in blocks]), best, atol=1e-6)
    # Rounding may decide between equal scores.
    assert (np.concatenate([block[0] for block in blocks]) != labels).mean() < 0.01


def cpu_s(labels: Array) -> float:
    began_s = time.process_time()
    assert of_map(labels, _background=-1)["code"] == 0
    return time.process_time() - began_s


@pytest.mark.parametrize("name", ["chessboard", "holes", "rings", "stripes"])
def test_cost_follows_the_pixels_whatever_the_regions(name: str) -> None:
    y, x = np.indices((1000, 1000))
    labels = {
        "chessboard": (x + y) % 2,
        "holes": (x % 2) & (y % 2),
        "rings": np.maximum(abs(x - 500), abs(y - 500)) % 3,
        "stripes": x % 250,
    }[name]
    # A search for outlines that takes 300 times as long, as OpenCV's with a hierarchy does, is found on any machine.
    flat_s = min(cpu_s(np.zeros((1000, 1000))) for _ in range(3))
    assert cpu_s(labels) < 200 * flat_s


def test_map_with_too_many_changes_gives_code_400() -> None:
    ret = of_map(np.indices((2100, 2100)).sum(axis=0) % 2)
    assert (ret["code"], ret["message"]) == (
        400,
        "the classes on the image change more than 4194304 times along its rows",
    )


def test_outlines_with_too_many_corners_give_code_400(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlines, "MAX_POINTS", 100)
    assert of_map(np.indices((10, 10)).sum(axis=0) % 2)["code"] == 0
    ret = of_map(np.indices((40, 40)).sum(axis=0) % 2)
    assert (ret["code"], ret["message"]) == (400, "the outlines of the image's regions have more than 100 corners")


def test_scores_and_time_of_a_request_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(1).random((6, 40, 40))
    assert of_map(scores, size=(200, 200))["code"] == 0
    monkeypatch.setattr(effort, "MAX_SCORES", 100_000)
    ret = of_map(scores, size=(200, 200))
    assert (ret["code"], "too many pixels for the classes on it" in ret["message"]) == (400, True)
    monkeypatch.undo()
    monkeypatch.setattr(effort, "MAX_CPU_S", -1.0)
    ret = of_map(scores, size=(200, 200))
    assert (ret["code"], ret["message"]) == (400, "the image takes more than -1 s after the net; send a smaller image")


def test_only_the_1000_largest_regions_are_listed() -> None:
    noise = np.random.default_rng(1).random((300, 300)) < 0.1
    assert len(of_map(noise)["result"]["detections"]) == 1000


@pytest.mark.parametrize("value", [np.nan, np.inf, -1, 2**20])
def test_output_that_is_no_map_gives_code_500(value: float) -> None:
    assert of_map(np.full((4, 4), value))["code"] == 500


def test_default_palette_is_the_palette_of_pascal_voc() -> None:
    assert palette()[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette()[[8, 15, 20, 255]].tolist() == [[64, 0, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192]]
    assert len(np.unique(palette(), axis=0)) == 256
