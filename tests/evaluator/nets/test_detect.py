"""The built-in detector, tested with a small SSD made here, with rows of a DetectionOutput, and with a real network."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from atserving.errors import InvalidArgument
from evaluator.net_contract import Ret
from evaluator.nets import detect
from evaluator.nets.image_input import ImageNet
from evaluator.runtime.preprocessing import Geometry
from tests.caffe.nets import MODELS, input_layer, layer
from tests.evaluator.built_in import Array, config, evaluate, files, loaded, start_error, with_outputs

# Has one prior for each quarter of the image, and detects the quarter if its mean colour is bright.
QUARTERS = (
    input_layer(1, 3, 16, 16)
    + layer("Pooling", "data", "quarters", "pooling_param { pool: AVE kernel_size: 8 stride: 8 }")
    + layer("Convolution", "quarters", "conf", "convolution_param { num_output: 3 kernel_size: 1 }", "conf")
    + layer("Convolution", "quarters", "loc", "convolution_param { num_output: 4 kernel_size: 1 }", "loc")
    + layer("Permute", "conf", "conf_last", "permute_param { order: 0 order: 2 order: 3 order: 1 }", "conf_last")
    + layer("Reshape", "conf_last", "conf_rows", "reshape_param { shape { dim: 0 dim: -1 dim: 3 } }", "conf_rows")
    + layer("Softmax", "conf_rows", "conf_prob", "softmax_param { axis: 2 }", "conf_prob")
    + layer("Flatten", "conf_prob", "conf_flat", "", "conf_flat")
    + layer("Permute", "loc", "loc_last", "permute_param { order: 0 order: 2 order: 3 order: 1 }", "loc_last")
    + layer("Flatten", "loc_last", "loc_flat", "", "loc_flat")
    + layer("PriorBox", "quarters data", "priors", "prior_box_param { min_size: 8 variance: 0.1 }", "priors")
    + layer(
        "DetectionOutput",
        "loc_flat conf_flat priors",
        "detections",
        "detection_output_param { num_classes: 3 nms_param { nms_threshold: 0.5 top_k: 10 } "
        "keep_top_k: 10 code_type: CENTER_SIZE confidence_threshold: 0.01 }",
    )
)
# Class 1 is blue, class 2 red. The background has a constant score of 2.5, which is higher than a dark colour's.
WEIGHTS = {
    "conf": [np.array([[0, 0, 0], [0.02, 0, 0], [0, 0, 0.02]]).reshape(3, 3, 1, 1), np.array([2.5, 0, 0])],
    "loc": [np.zeros((4, 3, 1, 1)), np.zeros(4)],
}


@pytest.fixture(scope="module")
def quarters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return files(tmp_path_factory.mktemp("quarters"), QUARTERS, WEIGHTS, "0,nothing\n1,blue\n2,red thing\n")


def picture(**quarter: str) -> Array:
    """Return an image 160 wide and 80 high, with these quarters in colour and the others black."""
    image = np.zeros((80, 160, 3), np.uint8)
    slices = {"tl": np.s_[:40, :80], "tr": np.s_[:40, 80:], "bl": np.s_[40:, :80], "br": np.s_[40:, 80:]}
    for name, colour in quarter.items():
        image[slices[name]] = {"blue": (255, 0, 0), "red": (0, 0, 255), "dim": (0, 0, 115)}[colour]
    return image


def test_detection_has_the_fields_of_the_contract(quarters: dict[str, Path]) -> None:
    (ret,) = evaluate(loaded("detect", config(quarters)), (picture(tr="red"), None))
    assert (ret["code"], list(ret["result"])) == (0, ["detections"])
    (found,) = ret["result"]["detections"]
    assert list(found) == ["pts", "index", "class", "score"]
    assert found["pts"] == [[80, 0], [159, 0], [159, 40], [80, 40]]
    assert all(type(number) is int for point in found["pts"] for number in point)
    assert (found["index"], found["class"]) == (2, "red thing")
    assert type(found["score"]) is float
    assert 0.5 < found["score"] <= 1


def test_each_request_of_a_batch_gets_its_own_detections_best_first(quarters: dict[str, Path]) -> None:
    model = loaded("detect", config(quarters, batch_size=3))
    assert model.batch_size == 3
    both, none, one = evaluate(
        model, (picture(bl="dim", tr="blue"), {"threshold": 0.4}), (picture(), {}), (picture(br="red"), None)
    )
    assert [each["class"] for each in both["result"]["detections"]] == ["blue", "red thing"]
    scores = [each["score"] for each in both["result"]["detections"]]
    assert scores == sorted(scores, reverse=True)
    assert none["result"] == {"detections": []}
    assert [each["pts"][0] for each in one["result"]["detections"]] == [[80, 40]]


def test_threshold_comes_from_the_request_or_else_the_release_or_else_is_a_half(quarters: dict[str, Path]) -> None:
    image = picture(tl="red", br="dim")

    def count(model: ImageNet, params: Any) -> int:
        return len(evaluate(model, (image, params))[0]["result"]["detections"])

    default, low = loaded("detect", config(quarters)), loaded("detect", config(quarters, threshold=0.3))
    assert (count(default, None), count(default, {"threshold": 0.3}), count(default, {"threshold": 1})) == (1, 2, 0)
    assert (count(low, {}), count(low, {"threshold": 0.5})) == (2, 1)
    assert count(default, {"threshold": 0}) >= 2


@pytest.mark.parametrize("threshold", [-0.1, 1.1, "0.5", None, True, [], 10**400])
def test_bad_threshold_is_refused(quarters: dict[str, Path], threshold: Any) -> None:
    model = loaded("detect", config(quarters))
    with pytest.raises(InvalidArgument, match=r"params\.threshold should be a number from 0 to 1"):
        evaluate(model, (picture(), {"threshold": threshold}))


def test_group_and_params_that_are_no_object_are_refused(quarters: dict[str, Path]) -> None:
    model = loaded("detect", config(quarters))
    with pytest.raises(InvalidArgument, match="detect takes one image, not a list of them"):
        model.preprocess({"data": [{"body": b""}]})
    with pytest.raises(InvalidArgument, match="params should be an object"):
        evaluate(model, (picture(), [1]))


def test_boxes_refer_to_the_upright_image(quarters: dict[str, Path]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn: the stored top left is the top right of the upright image
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture(tl="red")[:, :, ::-1])).save(buffer, "PNG", exif=exif)
    model = loaded("detect", config(quarters))
    req = model.preprocess({"data": {"body": buffer.getvalue()}})
    (ret,) = model.infer("r", [req])
    assert req.size == (80, 160)
    assert [each["pts"] for each in ret["result"]["detections"]] == [[[40, 0], [79, 0], [79, 80], [40, 80]]]


def test_boxes_of_a_cropped_input_refer_to_the_whole_image(quarters: dict[str, Path]) -> None:
    # The net sees the middle half: columns 40 to 120 and rows 20 to 60.
    model = loaded("detect", config(quarters, image_width=32))
    image = np.zeros((80, 160, 3), np.uint8)
    image[20:40, 80:120] = (0, 0, 255)
    (ret,) = evaluate(model, (image, None))
    assert [each["pts"] for each in ret["result"]["detections"]] == [[[80, 20], [120, 20], [120, 40], [80, 40]]]


def detections(
    *rows: list[float], requests: int = 1, size: tuple[int, int] = (100, 50), geometry: Geometry | None = None
) -> list[Ret]:
    """Return the rets for the rows of a DetectionOutput, one per request for an image of that size."""
    outputs = {"out": np.array(rows).reshape(1, 1, -1, 7)}
    attributes: dict[str, Any] = {"geometry": geometry} if geometry else {}
    net = with_outputs("detect", outputs, head=detect.DetectionOutput("out"), **attributes)
    return net.infer("r", [detect.Input(np.zeros((2, 2, 3), np.uint8), size, 0.0)] * requests)


def test_boxes_are_clipped_to_the_image_and_boxes_outside_are_dropped() -> None:
    (ret,) = detections(
        [0, 1, 0.9, -0.5, -0.5, 1.5, 1.5],
        [0, 2, 0.8, 0.25, 0.5, 0.5, 1.0],
        [0, 3, 0.7, 1.1, 0.1, 1.4, 0.4],
        [0, 4, 0.6, 0.6, 0.6, 0.6, 0.9],
        [0, 5, 0.5, 0.9, 0.9, 0.1, 0.1],
    )
    found = ret["result"]["detections"]
    assert [each["index"] for each in found] == [1, 2]
    assert found[0]["pts"] == [[0, 0], [99, 0], [99, 49], [0, 49]]
    assert found[1]["pts"] == [[25, 25], [50, 25], [50, 49], [25, 49]]
    assert found[0]["class"] == "1"


@given(
    size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    input_size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    margin=st.integers(0, 400),
    box=st.tuples(*[st.floats(-3, 3, width=32)] * 4),
)
def test_corners_are_clockwise_from_top_left_and_inside_images_of_any_size(
    size: tuple[int, int], input_size: tuple[int, int], margin: int, box: tuple[float, ...]
) -> None:
    geometry = Geometry((3, *input_size), input_size[1] + margin)
    for each in detections([0, 1, 0.9, *box], size=size, geometry=geometry)[0]["result"]["detections"]:
        (left, top), _, (right, bottom), _ = each["pts"]
        assert each["pts"] == [[left, top], [right, top], [right, bottom], [left, bottom]]
        assert 0 <= left <= right < size[0]
        assert 0 <= top <= bottom < size[1]


def test_rows_without_an_image_and_an_empty_output_give_no_detections() -> None:
    assert [ret["result"] for ret in detections(requests=2)] == [{"detections": []}] * 2
    rets = detections([-1, 1, 0.9, 0, 0, 1, 1], [1, 1, 0.9, 0, 0, 1, 1], requests=2)
    assert [len(ret["result"]["detections"]) for ret in rets] == [0, 1]


def test_row_that_is_not_finite_fails_only_its_own_image() -> None:
    rets = detections([0, 1, float("nan"), 0, 0, 1, 1], [1, 1, 0.9, 0, 0, 1, 1], requests=2)
    assert [ret["code"] for ret in rets] == [500, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": 1.5}, "custom_values.threshold is 1.5, should be 0 to 1"),
        ({"threshold": "x"}, "custom_values.threshold is 'x', should be a finite number"),
        ({"output": "conf"}, "the net's outputs are ['detections']; custom_values.output should name"),
    ],
)
def test_wrong_custom_values_fail_to_load(quarters: dict[str, Path], fields: dict[str, Any], message: str) -> None:
    assert message in start_error("detect", config(quarters, **fields))


def test_net_without_detections_does_not_load(tmp_path: Path) -> None:
    net = files(tmp_path, input_layer(1, 3, 4, 4) + layer("Softmax", tops="prob"))
    assert "'prob' is no such output" in start_error("detect", config(net))


@pytest.mark.skipif(not MODELS.is_dir(), reason="the real models are not here")
def test_real_network_finds_the_faces_of_a_photograph() -> None:
    names = ("deploy.prototxt", "weight.caffemodel")
    release = config({name: MODELS / "yuface_ssd_v1" / name for name in names}, mean_values=[103.94, 116.78, 123.68])
    model = loaded("detect", release)
    body = (MODELS / "images" / "mtcnn_test1.jpg").read_bytes()
    reqs = [model.preprocess({"data": {"body": body}}) for _ in range(2)]
    first, second = (ret["result"]["detections"] for ret in model.infer("r", reqs))
    width, height = reqs[0].size
    assert len(first) == 2
    assert [each["pts"] for each in first] == [each["pts"] for each in second]
    for face in first:
        (left, top), _, (right, bottom), _ = face["pts"]
        assert 0 <= left < right < width
        assert 0 <= top < bottom < height
        # A face is about as wide as it is high.
        assert 0.4 < (right - left) / (bottom - top) < 1.6
