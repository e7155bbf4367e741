"""Layers without a fixture match their published definitions in plain NumPy, or OpenCV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluator.caffe import ConversionError, convert

from .boxes import overlap
from .nets import FIXTURES, Array, answer, draw_weights, error, input_layer, layer, normal, run, write_net
from .oracle import opencv_outputs

TOLERANCE = 1e-5
DATA = normal(3, 4, 9, 11, seed=3)
NET = input_layer(1, 4, 9, 11)


def check_against_opencv(folder: Path, prototxt: str, data: Array) -> None:
    weights = draw_weights(prototxt)
    ours = run(convert(*write_net(folder, prototxt, weights)), {"data": data})
    theirs = opencv_outputs(folder, prototxt, weights, {"data": data}, ["out"])
    assert error(ours["out"], theirs["out"]) < TOLERANCE


@pytest.mark.parametrize("kind", ["DepthwiseConvolution", "ConvolutionDepthwise"])
def test_depthwise_convolution_has_one_group_per_channel(kind: str, tmp_path: Path) -> None:
    fixture = FIXTURES / "conv_depthwise"
    prototxt = (fixture / "deploy.prototxt").read_text().replace('"Convolution"', f'"{kind}"')
    assert kind in prototxt
    assert "group: 4" in prototxt
    (tmp_path / "deploy.prototxt").write_text(prototxt.replace("group: 4", ""))
    expected = np.load(fixture / "expected.npz")
    model = convert(tmp_path / "deploy.prototxt", fixture / "weight.caffemodel")
    assert error(run(model, {"data": expected["b3|in|data"]})["out"], expected["b3|out|out"]) < TOLERANCE


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_deconvolution_without_weights_uses_the_bilinear_filler(size: int, tmp_path: Path) -> None:
    prototxt = NET + layer(
        "Deconvolution",
        more=f"convolution_param {{ num_output: 4 group: 4 kernel_size: {size} stride: 2 pad: 1 bias_term: false "
        'weight_filler { type: "bilinear" } }',
    )
    factor = -(-size // 2)
    centre = (2 * factor - 1 - factor % 2) / (2 * factor)
    filler = np.array(
        [[(1 - abs(x / factor - centre)) * (1 - abs(y / factor - centre)) for x in range(size)] for y in range(size)]
    )
    weights = {"the_Deconvolution": [np.broadcast_to(filler, (4, 1, size, size))]}
    expected = opencv_outputs(tmp_path, prototxt, weights, {"data": DATA}, ["out"])["out"]
    assert error(answer(tmp_path, prototxt, {}, data=DATA), expected) < TOLERANCE


def test_batch_norm_with_a_factor_of_zero_has_zero_mean_and_variance(tmp_path: Path) -> None:
    prototxt = NET + layer("BatchNorm", more="batch_norm_param { eps: 0.01 }")
    weights = {"the_BatchNorm": [np.full(4, 3.0), np.full(4, 5.0), np.zeros(1)]}
    assert error(answer(tmp_path, prototxt, weights, data=DATA), DATA / 0.1) < TOLERANCE


@pytest.mark.parametrize("shape", [(4,), (1, 4, 1, 1)])
def test_segnet_bn_is_scale_and_shift(shape: tuple[int, ...], tmp_path: Path) -> None:
    prototxt = NET + layer("BN", more="bn_param { bn_mode: INFERENCE scale_filler { value: 1 } }")
    scale, shift = np.array([2, 0.5, -1, 1]), np.array([0.1, 0, 3, -2])
    weights = {"the_BN": [scale.reshape(shape), shift.reshape(shape)]}
    expected = DATA * scale.reshape(1, 4, 1, 1) + shift.reshape(1, 4, 1, 1)
    assert error(answer(tmp_path, prototxt, weights, data=DATA), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("more", "factor"),
    [("alpha: 0 k: 4 beta: 0.5", 0.5), ("beta: 0 k: 4", 1.0), ("alpha: 0 k: 4 norm_region: WITHIN_CHANNEL", 1.0)],
)
def test_lrn_with_zero_alpha_or_beta_is_a_factor(more: str, factor: float, tmp_path: Path) -> None:
    assert error(answer(tmp_path, NET + layer("LRN", more=f"lrn_param {{ {more} }}"), data=DATA), DATA * factor) < 1e-6


def test_relu6_clips_at_zero_and_six(tmp_path: Path) -> None:
    assert error(answer(tmp_path, NET + layer("ReLU6"), data=DATA * 5), np.clip(DATA * 5, 0, 6)) < TOLERANCE


def test_clip_clips_at_its_limits(tmp_path: Path) -> None:
    prototxt = NET + layer("Clip", more="clip_param { min: -0.5 max: 0.25 }")
    assert error(answer(tmp_path, prototxt, data=DATA), DATA.clip(-0.5, 0.25)) < TOLERANCE


def test_shuffle_channel_interleaves_the_groups(tmp_path: Path) -> None:
    prototxt = input_layer(1, 12, 3, 4) + layer("ShuffleChannel", more="shuffle_channel_param { group: 3 }")
    data = normal(2, 12, 3, 4)
    expected = data.reshape(2, 3, 4, 3, 4).transpose(0, 2, 1, 3, 4).reshape(data.shape)
    assert error(answer(tmp_path, prototxt, data=data), expected) == 0


@pytest.mark.parametrize("wide", [(), (1, 1)])
def test_axpy_scales_the_channels_and_adds(wide: tuple[int, ...], tmp_path: Path) -> None:
    prototxt = input_layer(1, 4, *wide, name="a") + NET + input_layer(1, 4, 9, 11, name="y")
    prototxt += layer("Axpy", "a data y")
    factor, y = normal(3, 4, *wide, seed=1), normal(3, 4, 9, 11, seed=2)
    expected = factor.reshape(3, 4, 1, 1) * DATA + y
    assert error(answer(tmp_path, prototxt, a=factor, data=DATA, y=y), expected) < TOLERANCE


def bilinear(data: Array, height: int, width: int) -> Array:
    """Resize with aligned corners."""
    for axis, size in ((2, height), (3, width)):
        position = np.arange(size) * ((data.shape[axis] - 1) / (size - 1) if size > 1 else 0)
        low = np.minimum(np.floor(position).astype(int), data.shape[axis] - 1)
        high = np.minimum(low + 1, data.shape[axis] - 1)
        share = (position - low).reshape([-1 if i == axis else 1 for i in range(4)])
        data = np.take(data, low, axis) * (1 - share) + np.take(data, high, axis) * share
    return data


@pytest.mark.parametrize(
    ("more", "size", "crop"),
    [
        ("height: 17 width: 23", (17, 23), (0, 0)),
        ("height: 5 width: 4", (5, 4), (0, 0)),
        ("height: 1 width: 1", (1, 1), (0, 0)),
        ("zoom_factor: 2", (17, 21), (0, 0)),
        ("shrink_factor: 2", (5, 6), (0, 0)),
        ("shrink_factor: 2 zoom_factor: 3", (13, 16), (0, 0)),
        ("height: 12 width: 13 pad_beg: -1 pad_end: -2", (12, 13), (1, 2)),
        ("zoom_factor: 2 pad_beg: 0 pad_end: -1", (15, 19), (0, 1)),
    ],
)
def test_interp_is_bilinear_with_aligned_corners(
    more: str, size: tuple[int, int], crop: tuple[int, int], tmp_path: Path
) -> None:
    cropped = DATA[:, :, crop[0] : 9 - crop[1], crop[0] : 11 - crop[1]]
    result = answer(tmp_path, NET + layer("Interp", more=f"interp_param {{ {more} }}"), data=DATA)
    assert error(result, bilinear(cropped, *size)) < TOLERANCE


def test_interp_matches_opencv(tmp_path: Path) -> None:
    check_against_opencv(tmp_path, NET + layer("Interp", more="interp_param { height: 20 width: 15 }"), DATA)


def test_upsample_repeats_rows_and_columns(tmp_path: Path) -> None:
    result = answer(tmp_path, NET + layer("Upsample", more="upsample_param { scale: 3 }"), data=DATA)
    assert error(result, DATA.repeat(3, 2).repeat(3, 3)) == 0


@pytest.mark.parametrize(
    ("height", "width", "more"),
    [(8, 12, "scale: 2"), (7, 11, "scale: 2 upsample_h: 7 upsample_w: 11"), (7, 12, "scale: 2 pad_out_h: true")],
)
def test_upsample_with_a_mask_restores_the_positions_of_the_maxima(
    height: int, width: int, more: str, tmp_path: Path
) -> None:
    prototxt = (
        input_layer(1, 3, height, width)
        + layer("Pooling", tops="pool mask", more="pooling_param { kernel_size: 2 stride: 2 }")
        + layer("Power", "pool", "twice", "power_param { scale: 2 }")
        + layer("Upsample", "twice mask", more=f"upsample_param {{ {more} }}")
    )
    data = normal(3, 3, height, width)
    expected = np.zeros_like(data)
    for n, c, y, x in np.ndindex(3, 3, -(-height // 2), -(-width // 2)):
        window = data[n, c, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        row, column = np.unravel_index(window.argmax(), window.shape)
        expected[n, c, 2 * y + row, 2 * x + column] = 2 * window.max()
    assert error(answer(tmp_path, prototxt, data=data), expected) < TOLERANCE


@pytest.mark.parametrize("across", ["true", "false"])
@pytest.mark.parametrize("shared", ["true", "false"])
def test_normalize_divides_by_the_root_of_the_sum_of_squares(across: str, shared: str, tmp_path: Path) -> None:
    prototxt = NET + layer(
        "Normalize", more=f"norm_param {{ across_spatial: {across} channel_shared: {shared} eps: 0.5 }}"
    )
    scale = np.array([2.0]) if shared == "true" else np.array([1.0, -2, 3, 0.5])
    total = (DATA**2).sum((1, 2, 3) if across == "true" else 1, keepdims=True)
    expected = DATA / np.sqrt(total + 0.5) * scale.reshape(1, -1, 1, 1)
    assert error(answer(tmp_path, prototxt, {"the_Normalize": [scale]}, data=DATA), expected) < TOLERANCE


VARIANCE = "variance: 0.1 variance: 0.1 variance: 0.2 variance: 0.3"
PRIORS = [
    "min_size: 8 clip: false",
    "min_size: 8 max_size: 15 clip: false",
    "min_size: 8 min_size: 12 max_size: 15 max_size: 20 aspect_ratio: 2 flip: false clip: false",
    "min_size: 8 aspect_ratio: 2 aspect_ratio: 0.5 aspect_ratio: 1 aspect_ratio: 3 clip: true offset: 0.25",
    "min_size: 8 aspect_ratio: 3 step_h: 4 step_w: 5 clip: false",
]


@pytest.mark.parametrize("more", PRIORS)
def test_prior_box_matches_opencv(more: str, tmp_path: Path) -> None:
    prototxt = (
        input_layer(1, 3, 32, 40)
        + layer("Pooling", tops="pool", more="pooling_param { kernel_size: 8 stride: 8 }")
        + layer("PriorBox", "pool data", more=f"prior_box_param {{ {more} {VARIANCE} }}")
    )
    check_against_opencv(tmp_path, prototxt, normal(1, 3, 32, 40))


def pooled_regions(data: Array, regions: Array, size: tuple[int, int], scale: float) -> Array:
    """Compute ROIPooling as in Fast R-CNN's roi_pooling_layer.cpp."""
    pooled = np.zeros((len(regions), data.shape[1], *size), np.float32)
    for r, (image, *box) in enumerate(regions):
        left, top, right, bottom = (int(np.floor(number * scale + 0.5)) for number in box)
        height, width = max(bottom - top + 1, 1), max(right - left + 1, 1)
        for y, x in np.ndindex(*size):
            # In float32, and a division before the multiplication, as in the published code.
            row_step, column_step = np.float32(height) / np.float32(size[0]), np.float32(width) / np.float32(size[1])
            rows = np.floor(y * row_step) + top, np.ceil((y + 1) * row_step) + top
            columns = np.floor(x * column_step) + left, np.ceil((x + 1) * column_step) + left
            y0, y1 = (int(min(max(row, 0), data.shape[2])) for row in rows)
            x0, x1 = (int(min(max(column, 0), data.shape[3])) for column in columns)
            if y1 > y0 and x1 > x0:
                pooled[r, :, y, x] = data[int(image), :, y0:y1, x0:x1].max(axis=(1, 2))
    return pooled


def test_roi_pooling_gives_the_maximum_of_every_part(tmp_path: Path) -> None:
    prototxt = input_layer(1, 4, 9, 11) + input_layer(1, 5, name="rois")
    prototxt += layer(
        "ROIPooling", "data rois", more="roi_pooling_param { pooled_h: 3 pooled_w: 2 spatial_scale: 0.25 }"
    )
    random = np.random.default_rng(5)
    corners = np.sort(random.uniform(-4, 50, (20, 2, 2)), axis=1).reshape(20, 4)
    regions = np.concatenate([random.integers(0, 3, (20, 1)), corners], axis=1).astype(np.float32)
    expected = pooled_regions(DATA, regions, (3, 2), 0.25)
    assert error(answer(tmp_path, prototxt, data=DATA, rois=regions), expected) < TOLERANCE


def proposed(scores: Array, deltas: Array, info: Array, settings: dict[str, Any]) -> Array:
    """Compute one image's proposals as in py-faster-rcnn's proposal_layer.py; rows (score, x1, y1, x2, y2)."""
    anchors = []
    for ratio in (0.5, 1, 2):
        width = np.round(np.sqrt(256 / ratio))
        height = np.round(width * ratio)
        for scale in (8, 16, 32):
            w, h = width * scale, height * scale
            anchors.append([7.5 - (w - 1) / 2, 7.5 - (h - 1) / 2, 7.5 + (w - 1) / 2, 7.5 + (h - 1) / 2])
    found = []
    for y, x, a in np.ndindex(*scores.shape[1:], 9):
        left, top, right, bottom = np.array(anchors[a]) + np.array([x, y, x, y]) * 16
        w, h = right - left + 1, bottom - top + 1
        dx, dy, dw, dh = deltas[4 * a : 4 * a + 4, y, x]
        cx, cy, w2, h2 = dx * w + left + w / 2, dy * h + top + h / 2, np.exp(dw) * w, np.exp(dh) * h
        box = np.array([cx - w2 / 2, cy - h2 / 2, cx + w2 / 2, cy + h2 / 2])
        box = box.clip(0, [info[1] - 1, info[0] - 1] * 2)
        if min(box[2:] - box[:2] + 1) >= settings["min_size"] * info[2]:
            found.append([scores[9 + a, y, x], *box])
    table = np.array(sorted(found, key=lambda row: -row[0])[: settings["pre_nms_topn"]])
    kept: list[Array] = []
    for row in table:
        if all(overlap(row[1:], other[1:], 1) <= settings["nms_thresh"] for other in kept):
            kept.append(row)
    return np.array(kept[: settings["post_nms_topn"]])


@pytest.mark.parametrize(
    ("kind", "settings", "more"),
    [
        (
            "Proposal",
            {"min_size": 16, "pre_nms_topn": 200, "post_nms_topn": 30, "nms_thresh": 0.6},
            "proposal_param { pre_nms_topn: 200 post_nms_topn: 30 nms_thresh: 0.6 }",
        ),
        (
            "Python",
            {"min_size": 16, "pre_nms_topn": 6000, "post_nms_topn": 300, "nms_thresh": 0.7},
            'python_param { module: "rpn.proposal_layer" layer: "ProposalLayer" param_str: "\'feat_stride\': 16" }',
        ),
    ],
)
def test_proposal_matches_faster_rcnn(kind: str, settings: dict[str, Any], more: str, tmp_path: Path) -> None:
    prototxt = input_layer(1, 18, 6, 8, name="scores") + input_layer(1, 36, 6, 8, name="deltas")
    prototxt += input_layer(1, 3, name="info") + layer(kind, "scores deltas info", "rois probs", more)
    random = np.random.default_rng(11)
    feeds = {
        "scores": random.uniform(0, 1, (2, 18, 6, 8)).astype(np.float32),
        "deltas": random.normal(0, 0.2, (2, 36, 6, 8)).astype(np.float32),
        "info": np.array([[96, 128, 1], [90, 120, 2.5]], np.float32),
    }
    outputs = run(convert(*write_net(tmp_path, prototxt, {})), feeds)
    expected = [proposed(feeds["scores"][i], feeds["deltas"][i], feeds["info"][i], settings) for i in range(2)]
    rois = np.concatenate([np.c_[np.full(len(part), i), part[:, 1:]] for i, part in enumerate(expected)])
    assert error(outputs["rois"], rois) < TOLERANCE
    assert error(outputs["probs"], np.concatenate([part[:, :1] for part in expected])) < TOLERANCE


def test_other_python_layers_are_refused(tmp_path: Path) -> None:
    prototxt = NET + layer("Python", more='python_param { module: "mine" layer: "Layer" }')
    with pytest.raises(
        ConversionError, match=r"layer 'the_Python' \(Python\): the Python layer mine\.Layer is not supported"
    ):
        convert(*write_net(tmp_path, prototxt, {}))
