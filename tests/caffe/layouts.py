"""Whole nets of our own, with the layouts of published ones.

The fixtures `net_...` are small whole nets with the answers of BVLC Caffe. These are the larger ones, and those with
layers that BVLC Caffe does not have; OpenCV is their oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.nets import CaffeNet, NetBuilder, mobilenet_v1, resnet_50


@dataclass(frozen=True)
class Layout:
    """A net, and the blobs inside it that are compared too, for instance those before a softmax."""

    make: Callable[[], CaffeNet]
    blobs: tuple[str, ...] = ()


def uniform(channels: int, low: float, high: float) -> NDArray[np.float32]:
    """Return a number per channel."""
    return np.random.default_rng(channels).uniform(low, high, channels).astype(np.float32)


def ssd() -> CaffeNet:
    """A single-shot detector: Normalize, a PriorBox for each of three maps, and a DetectionOutput."""
    net = NetBuilder("ssd")
    blob = net.input(3, 96, 128)
    maps = []
    for number, (outputs, stride) in enumerate(((16, 2), (24, 2), (32, 2), (32, 2), (32, 2)), start=1):
        name = f"conv{number}"
        blob = net.relu(net.convolution(blob, name, outputs, 3, stride=stride, pad=1, bias=True), name)
        maps.append(blob)
    fields = "norm_param { across_spatial: false channel_shared: false }"
    maps = [net.layer("Normalize", "norm3", [maps[2]], fields, weights=[uniform(32, 5, 20)]), *maps[3:]]
    rows: dict[str, list[str]] = {"loc": [], "conf": [], "priors": []}
    for number, (each, size) in enumerate(zip(maps, (16, 32, 64), strict=True), start=3):
        for kind, numbers in (("loc", 4), ("conf", 3)):
            name = f"{kind}{number}"
            net.convolution(each, name, 4 * numbers, 3, pad=1, bias=True, scale=0.2)
            net.layer("Permute", f"{name}_last", [name], "permute_param { order: 0 order: 2 order: 3 order: 1 }")
            rows[kind].append(net.layer("Flatten", f"{name}_flat", [f"{name}_last"]))
        sizes = f"min_size: {size} max_size: {2 * size} aspect_ratio: 2 flip: true clip: false"
        variances = "variance: 0.1 variance: 0.1 variance: 0.2 variance: 0.2"
        fields = f"prior_box_param {{ {sizes} {variances} offset: 0.5 }}"
        rows["priors"].append(net.layer("PriorBox", f"priors{number}", [each, "data"], fields))
    net.layer("Concat", "loc", rows["loc"], "concat_param { axis: 1 }")
    net.layer("Concat", "conf", rows["conf"], "concat_param { axis: 1 }")
    net.layer("Concat", "priors", rows["priors"], "concat_param { axis: 2 }")
    net.layer("Reshape", "conf_rows", ["conf"], "reshape_param { shape { dim: 0 dim: -1 dim: 3 } }")
    net.layer("Softmax", "conf_prob", ["conf_rows"], "softmax_param { axis: 2 }")
    net.layer("Flatten", "conf_flat", ["conf_prob"], "flatten_param { axis: 1 }")
    detection = [
        "num_classes: 3 share_location: true background_label_id: 0 code_type: CENTER_SIZE",
        "keep_top_k: 50 confidence_threshold: 0.3 nms_param { nms_threshold: 0.45 top_k: 100 }",
    ]
    bottoms = ["loc", "conf_flat", "priors"]
    net.layer("DetectionOutput", "detections", bottoms, f"detection_output_param {{ {' '.join(detection)} }}")
    return net.build()


def unpooling() -> CaffeNet:
    """A segmenter that puts maxima back where they were: PReLU, masks of poolings, Upsample by mask, SegNet's BN."""
    net = NetBuilder("unpooling")

    def block(bottom: str, name: str, outputs: int) -> str:
        net.convolution(bottom, name, outputs, 3, pad=1, bias=True)
        scale_and_shift = [
            each.reshape(1, -1, 1, 1) for each in (uniform(outputs, 0.8, 1.2), uniform(outputs, -0.1, 0.1))
        ]
        net.layer("BN", f"{name}/bn", [name], "bn_param { bn_mode: INFERENCE }", weights=scale_and_shift)
        return net.layer("PReLU", f"{name}/prelu", [f"{name}/bn"], weights=[uniform(outputs, 0.1, 0.4)])

    blob = block(net.input(3, 48, 64), "encoder1", 8)
    blob = _masked_pooling(net, blob, "pool1")
    blob = block(blob, "encoder2", 12)
    blob = _masked_pooling(net, blob, "pool2")
    for number, dilation in enumerate((2, 4), start=1):
        branch = net.convolution(blob, f"middle{number}", 12, 3, pad=dilation, dilation=dilation, bias=True)
        blob = net.relu(net.add([blob, branch], f"sum{number}"), f"sum{number}")
    blob = net.layer("Upsample", "unpool2", [blob, "pool2_mask"], "upsample_param { scale: 2 }")
    blob = block(blob, "decoder2", 8)
    blob = net.layer("Upsample", "unpool1", [blob, "pool1_mask"], "upsample_param { scale: 2 }")
    net.convolution(net.concat([blob, "encoder1/prelu"], "joined"), "scores", 5, 3, pad=1, bias=True)
    net.softmax("scores", "map")
    return net.build()


def _masked_pooling(net: NetBuilder, bottom: str, name: str) -> str:
    """Add a pooling with the places of its maxima as a second top, ``<name>_mask``."""
    return net.layer(
        "Pooling", name, [bottom], "pooling_param { pool: MAX kernel_size: 2 stride: 2 }", more_tops=[f"{name}_mask"]
    )


def yolo() -> CaffeNet:
    """A detector of three grids: x * sigmoid(x), a pooling pyramid, and maps that are enlarged and joined."""
    net = NetBuilder("yolo")

    def swish(bottom: str, name: str, outputs: int, kernel: int = 1, stride: int = 1) -> str:
        net.convolution(bottom, name, outputs, kernel, stride=stride, pad=kernel // 2, bias=True)
        gate = net.layer("Sigmoid", f"{name}/gate", [name])
        return net.layer("Eltwise", f"{name}/swish", [name, gate], "eltwise_param { operation: PROD }")

    blob = swish(net.input(3, 64, 96), "stem", 8, 5, 2)
    grids = []
    for number, outputs in enumerate((12, 16, 24, 24), start=1):
        blob = swish(blob, f"down{number}", outputs, 3, 2)
        grids.append(blob)
    pooled = [net.pooling(blob, f"pool{kernel}", "MAX", kernel, pad=kernel // 2) for kernel in (3, 5)]
    blob = swish(net.concat([blob, *pooled], "pyramid"), "deep", 24)
    heads = [blob]
    for number, grid in ((3, grids[2]), (2, grids[1])):
        reduced = swish(blob, f"reduce{number}", 12)
        if number == 3:
            larger = net.layer("Upsample", "larger3", [reduced], "upsample_param { scale: 2 }")
        else:
            larger = net.convolution(reduced, "larger2", 12, 2, stride=2, group=12, kind="Deconvolution")
        blob = swish(net.concat([larger, grid], f"join{number}"), f"grid{number}", 16, 3)
        heads.append(blob)
    for number, each in enumerate(heads, start=1):
        net.convolution(each, f"raw{number}", 2 * 8, bias=True)
        shape = "shape { dim: 0 dim: 2 dim: 8 dim: -1 }"
        net.layer("Reshape", f"anchors{number}", [f"raw{number}"], f"reshape_param {{ {shape} }}")
        net.layer(
            "Permute", f"rows{number}", [f"anchors{number}"], "permute_param { order: 0 order: 1 order: 3 order: 2 }"
        )
    return net.build()


LAYOUTS: Mapping[str, Layout] = {
    "mobilenet_v1": Layout(lambda: mobilenet_v1(size=96), ("classifier", "block6/depthwise")),
    "resnet_50": Layout(lambda: resnet_50(size=64), ("classifier", "stage2/block4/sum")),
    "ssd": Layout(ssd, ("loc", "conf")),
    "unpooling": Layout(unpooling, ("scores",)),
    "yolo": Layout(yolo),
}
