"""Faster R-CNN's Proposal.

Sources: Ren and others, Faster R-CNN, 2015, section 3.1; and its code, github.com/rbgirshick/py-faster-rcnn,
lib/rpn/proposal_layer.py and generate_anchors.py.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from ..caffe_pb2 import ProposalParameter
from ..graph import Value
from ..shapes import ROIS, Symbol, known, product, text
from .converters import LayerContext, converts

# Without a limit, a small prototxt could ask for any amount of memory.
_MAX_ANCHORS = 2**20


@converts("Python")
def python(ctx: LayerContext) -> list[Value]:
    """Convert the Python layer ProposalLayer of published Faster R-CNN nets. All other Python layers are refused."""
    param = ctx.param.python_param
    if param.layer != "ProposalLayer":
        ctx.fail(f"the Python layer {param.module}.{param.layer} is not supported")
    settings = ProposalParameter()
    # param_str is YAML. The published layer reads only feat_stride from it, and scales in later versions.
    stride = re.search(r"feat_stride'?\"?\s*:\s*(\d{1,6})\b", param.param_str)
    if stride is None:
        ctx.fail("its param_str has no feat_stride")
    if "scales" in param.param_str:
        ctx.fail("scales in its param_str is not supported")
    settings.feat_stride = int(stride.group(1))
    return _propose(ctx, settings)


@converts("Proposal")
def proposal(ctx: LayerContext) -> list[Value]:
    """Faster R-CNN's Proposal: regions (R, 5) with rows (image, x1, y1, x2, y2), and their scores (R, 1) as second top.

    Bottoms: objectness (N, 2A, H, W), box deltas (N, 4A, H, W), and image sizes (N, 3) with rows (height, width,
    scale). Corners are in pixels of the net's input.
    """
    return _propose(ctx, ctx.param.proposal_param)


def _propose(ctx: LayerContext, param: ProposalParameter) -> list[Value]:
    scores, deltas, info = ctx.bottom(3, 3), ctx.bottoms[1], ctx.bottoms[2]
    anchors = _anchors(ctx, param)
    images = scores.shape[0]
    number = len(anchors)
    if len(scores.shape) != 4 or len(deltas.shape) != 4 or product(info.shape[1:]) != 3:
        ctx.fail("its bottoms must have the shapes (N, 2A, H, W), (N, 4A, H, W) and (N, 3)")
    rows, columns = (known(dim, "the size of a Proposal's bottom") for dim in scores.shape[2:])
    if scores.shape[1] != 2 * number or deltas.shape != (images, 4 * number, rows, columns):
        ctx.fail(f"its bottoms {text(scores.shape)} and {text(deltas.shape)} do not match {number} anchors")
    every = rows * columns * number
    if every > _MAX_ANCHORS:
        ctx.fail(f"{every} anchors exceed the limit of {_MAX_ANCHORS}")
    info = ctx.reshape(info, (images, 3))
    boxes = _clipped(ctx, _moved(ctx, deltas, _shifted(param, anchors, rows, columns), every), info)
    foreground = _foreground(ctx, scores, number, every)
    valid = _large_enough(ctx, param, boxes, info, foreground)
    return _selected(ctx, param, boxes, valid, every)


def _anchors(ctx: LayerContext, param: ProposalParameter) -> NDArray[np.float64]:
    """Return the corners of the first cell's anchors in pixels, (A, 4), for every ratio and every scale.

    Source: generate_anchors.py, including its rounding.
    """
    ratios, scales = list(param.ratio) or [0.5, 1.0, 2.0], list(param.scale) or [8.0, 16.0, 32.0]
    numbers = np.asarray([*ratios, *scales])
    if not np.all((numbers > 0) & np.isfinite(numbers)) or len(ratios) * len(scales) > 1000:
        ctx.fail("every ratio and scale must be greater than 0, with at most 1000 anchors per cell")
    if not 1 <= param.base_size < 2**16 or not 1 <= param.feat_stride < 2**16:
        ctx.fail(f"base_size is {param.base_size}, feat_stride {param.feat_stride}")
    if param.pre_nms_topn < 1 or param.post_nms_topn < 1 or not 0 <= param.nms_thresh <= 1:
        ctx.fail("pre_nms_topn, post_nms_topn or nms_thresh is out of range")
    centre = (param.base_size - 1) / 2
    boxes = []
    for ratio in ratios:
        width = np.round(np.sqrt(param.base_size**2 / ratio))
        height = np.round(width * ratio)
        for scale in scales:
            half = np.array([width * scale - 1, height * scale - 1]) / 2
            boxes.append(np.concatenate([centre - half, centre + half]))
    return np.array(boxes)


def _shifted(param: ProposalParameter, anchors: NDArray[np.float64], rows: int, columns: int) -> NDArray[np.float64]:
    """Return the corners of every cell's anchors, (H * W * A, 4)."""
    x, y = np.meshgrid(np.arange(columns) * param.feat_stride, np.arange(rows) * param.feat_stride)
    shifts = np.stack([x, y, x, y], axis=-1)[:, :, None]
    return (shifts + anchors).reshape(-1, 4)


def _moved(ctx: LayerContext, deltas: Value, anchors: NDArray[np.float64], every: int) -> Value:
    """Apply the deltas to the anchors and return the boxes' corners, (N, H * W * A, 4).

    Source: bbox_transform_inv in lib/fast_rcnn/bbox_transform.py.
    """
    images = deltas.shape[0]
    listed = ctx.reshape(ctx.transpose(deltas, (0, 2, 3, 1)), (images, every, 4))
    pair = (images, every, 2)
    move, stretch = ctx.emit_many("Split", [listed, ctx.constant([2, 2], "halves")], [(pair, np.float32)] * 2, axis=2)
    size = anchors[:, 2:] - anchors[:, :2] + 1
    centre = ctx.emit("Mul", [move, ctx.constant(size, "anchor_size")], pair)
    centre = ctx.emit("Add", [centre, ctx.constant(anchors[:, :2] + size / 2, "anchor_centre")], pair)
    half = ctx.emit("Mul", [ctx.emit("Exp", [stretch], pair), ctx.constant(size / 2, "anchor_half")], pair)
    corners = [ctx.emit("Sub", [centre, half], pair), ctx.emit("Add", [centre, half], pair)]
    return ctx.emit("Concat", corners, (images, every, 4), axis=2)


def _clipped(ctx: LayerContext, boxes: Value, info: Value) -> Value:
    """Clip the boxes to their image, 0 to size - 1."""
    images = boxes.shape[0]
    order = ctx.constant([1, 0, 1, 0], "width_height")
    sizes = ctx.emit("Gather", [info, order], (images, 4), axis=1)
    last = ctx.emit("Sub", [sizes, ctx.constant(1.0, "one")], (images, 4))
    last = ctx.reshape(last, (images, 1, 4))
    above = ctx.emit("Max", [boxes, ctx.constant(0.0, "zero")], boxes.shape)
    return ctx.emit("Min", [above, last], boxes.shape)


def _foreground(ctx: LayerContext, scores: Value, number: int, every: int) -> Value:
    half = ((scores.shape[0], number, *scores.shape[2:]), np.float32)
    front = ctx.emit_many("Split", [scores, ctx.constant([number] * 2, "classes")], [half, half], axis=1)[1]
    return ctx.reshape(ctx.transpose(front, (0, 2, 3, 1)), (scores.shape[0], every))


def _large_enough(ctx: LayerContext, param: ProposalParameter, boxes: Value, info: Value, scores: Value) -> Value:
    """Replace the scores of boxes smaller than min_size in the original image by -inf."""
    images, every = scores.shape
    low, high = ctx.emit_many(
        "Split", [boxes, ctx.constant([2, 2], "halves")], [((images, every, 2), np.float32)] * 2, axis=2
    )
    size = ctx.emit("Add", [ctx.emit("Sub", [high, low], low.shape), ctx.constant(1.0, "one")], low.shape)
    side = ctx.emit("ReduceMin", [size, ctx.constant([2], "corners")], (images, every), keepdims=0)
    scale = ctx.emit("Gather", [info, ctx.constant([2], "scale")], (images, 1), axis=1)
    least = ctx.emit("Mul", [scale, ctx.constant(float(param.min_size), "min_size")], (images, 1))
    fits = ctx.emit("GreaterOrEqual", [side, least], (images, every), np.bool_)
    return ctx.emit("Where", [fits, scores, ctx.constant(-np.inf, "never")], (images, every))


def _selected(ctx: LayerContext, param: ProposalParameter, boxes: Value, scores: Value, every: int) -> list[Value]:
    """Suppress overlapping boxes among the pre_nms_topn best. Return the regions, and scores for a second top."""
    images, number = boxes.shape[0], min(param.pre_nms_topn, every)
    shape = (images, number)
    best, positions = ctx.emit_many(
        "TopK", [scores, ctx.constant([number], "pre_nms")], [(shape, np.float32), (shape, np.int64)], axis=1
    )
    index = ctx.emit("Unsqueeze", [positions, ctx.constant([2], "axes")], (*shape, 1), np.int64)
    found = ctx.emit("GatherND", [boxes, index], (*shape, 4), batch_dims=1)
    # The published code includes a box's last pixel, so it computes overlaps of boxes that are one pixel larger.
    whole = ctx.emit("Add", [found, ctx.constant([0.0, 0.0, 1.0, 1.0], "last_pixel")], found.shape)
    inputs = [
        whole,
        ctx.emit("Unsqueeze", [best, ctx.constant([1], "one_class")], (images, 1, number)),
        ctx.constant([min(param.post_nms_topn, number)], "post_nms"),
        ctx.constant([param.nms_thresh], "overlap"),
        ctx.constant([float(np.finfo(np.float32).min)], "threshold"),
    ]
    regions = Symbol(ROIS)
    chosen = ctx.emit("NonMaxSuppression", inputs, (regions, 3), np.int64)
    at = ctx.emit("Gather", [chosen, ctx.constant([0, 2], "image_place")], (regions, 2), np.int64, axis=1)
    box = ctx.emit("GatherND", [found, at], (regions, 4))
    image = ctx.emit("Gather", [chosen, ctx.constant([0], "image")], (regions, 1), np.int64, axis=1)
    made = [ctx.emit("Concat", [ctx.emit("Cast", [image], (regions, 1), to=1), box], (regions, 5), axis=1)]
    if len(ctx.tops) > 1:
        score = ctx.emit("GatherND", [best, at], (regions,))
        made.append(ctx.emit("Unsqueeze", [score, ctx.constant([1], "column")], (regions, 1)))
    return made
