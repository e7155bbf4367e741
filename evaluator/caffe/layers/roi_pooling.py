"""Fast R-CNN's ROIPooling.

ONNX's operator for it, MaxRoiPool, is not implemented by onnxruntime for opset 22. Instead, a table contains the maxima
of all windows of 2^a rows and 2^b columns. The maximum over any rectangle is the maximum of four table entries, because
four windows, which can overlap, cover the rectangle (a two-dimensional sparse table).

Sources: Girshick, Fast R-CNN, 2015, section 2.1; and its code, github.com/rbgirshick/caffe-fast-rcnn,
roi_pooling_layer.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..graph import Value
from ..shapes import Dim, Shape, Symbol, known, product, text
from .converters import LayerContext, converts

_MAX_SIZE = 2**12


@converts("ROIPooling")
def roi_pooling(ctx: LayerContext) -> list[Value]:
    """Fast R-CNN's ROIPooling: the maximum in each of pooled_h x pooled_w parts of every region; 0 for an empty part.

    Bottoms: (N, C, H, W) and regions (R, 5) with rows (image, x1, y1, x2, y2). Top: (R, C, pooled_h, pooled_w).
    """
    data, param = ctx.bottom(2, 2), ctx.param.roi_pooling_param
    regions = ctx.bottoms[1]
    if len(data.shape) != 4:
        ctx.fail(f"its first bottom has {len(data.shape)} axes, not 4")
    if product(regions.shape[1:]) != 5:
        ctx.fail(f"its second bottom has the shape {text(regions.shape)} but needs (R, 5)")
    if not 1 <= param.pooled_h < 2**10 or not 1 <= param.pooled_w < 2**10:
        ctx.fail(f"pooled_h is {param.pooled_h} and pooled_w is {param.pooled_w}; both must be 1 to 1023")
    if not 0 < param.spatial_scale < np.inf:
        ctx.fail(f"spatial_scale is {param.spatial_scale}")
    height, width = (known(dim, "the size of a ROIPooling's bottom") for dim in data.shape[2:])
    if max(height, width) > _MAX_SIZE:
        ctx.fail(f"a feature map of {height} x {width} exceeds the limit of {_MAX_SIZE} per side")
    image, corners = _corners(ctx, ctx.reshape(regions, (regions.shape[0], 5)))
    rows = _parts(ctx, corners, 1, param.pooled_h, height)
    columns = _parts(ctx, corners, 0, param.pooled_w, width)
    return [_look_up(ctx, _table(ctx, data), image, rows, columns)]


def _corners(ctx: LayerContext, regions: Value) -> tuple[Value, Value]:
    """Return the regions' images, int64 (R, 1), and corners in the feature map, (R, 4), rounded half away from zero."""
    count = regions.shape[0]
    image, box = ctx.emit_many(
        "Split",
        [regions, ctx.constant([1, 4], "parts")],
        [((count, 1), np.float32), ((count, 4), np.float32)],
        axis=1,
    )
    scaled = ctx.emit("Mul", [box, ctx.constant(ctx.param.roi_pooling_param.spatial_scale, "scale")], box.shape)
    size = ctx.emit("Floor", [_binary(ctx, "Add", ctx.emit("Abs", [scaled], box.shape), 0.5)], box.shape)
    sign = ctx.emit("Sign", [scaled], box.shape)
    return ctx.emit("Cast", [image], image.shape, np.int64, to=7), _binary(ctx, "Mul", sign, size)


@dataclass(frozen=True)
class _Parts:
    """The parts of the regions along one axis.

    Attributes:
        level, first, second: int64 (R, pooled) each; the windows of 2^level positions that start at `first` and at
            `second` cover the part.
        filled: bool (R, pooled); false for an empty part.
        size: the size of the feature map along the axis.
        levels: the number of window sizes.
    """

    level: Value
    first: Value
    second: Value
    filled: Value
    size: int
    levels: int


def _parts(ctx: LayerContext, corners: Value, axis: int, pooled: int, size: int) -> _Parts:
    count = corners.shape[0]
    single, shape = (count, 1), (count, pooled)
    start, stop = (ctx.emit("Gather", [corners, ctx.constant([axis + end], "side")], single, axis=1) for end in (0, 2))
    extent = _binary(ctx, "Max", _binary(ctx, "Add", _binary(ctx, "Sub", stop, start), 1.0), 1.0)
    step = _binary(ctx, "Div", extent, float(pooled))
    bounds = []
    for op, numbers in (("Floor", np.arange(pooled)), ("Ceil", np.arange(pooled) + 1)):
        scaled = ctx.emit("Mul", [step, ctx.constant(numbers.astype(np.float32)[None], "places")], shape)
        moved = ctx.emit("Add", [ctx.emit(op, [scaled], shape), start], shape)
        limits = [ctx.constant(0.0, "least"), ctx.constant(float(size), "most")]
        inside = ctx.emit("Clip", [moved, *limits], shape)
        bounds.append(ctx.emit("Cast", [inside], shape, np.int64, to=7))
    low, high = bounds
    length = ctx.emit("Max", [ctx.emit("Sub", [high, low], shape, np.int64), ctx.constant(0, "zero")], shape, np.int64)
    # For each length of a part: the largest power of two that fits. An empty part counts as length 1.
    logs = np.floor(np.log2(np.maximum(np.arange(size + 1), 1))).astype(np.int64)
    level = ctx.emit("Gather", [ctx.constant(logs, "levels"), length], shape, np.int64, axis=0)
    window = ctx.emit("Gather", [ctx.constant(2**logs, "windows"), length], shape, np.int64, axis=0)
    last = ctx.emit("Sub", [high, window], shape, np.int64)
    return _Parts(
        level,
        ctx.emit("Min", [low, ctx.constant(size - 1, "last")], shape, np.int64),
        ctx.emit("Max", [last, ctx.constant(0, "zero")], shape, np.int64),
        ctx.emit("Greater", [length, ctx.constant(0, "zero")], shape, np.bool_),
        size,
        int(logs[-1]) + 1,
    )


def _table(ctx: LayerContext, data: Value) -> Value:
    """Return the maxima of all windows, (levels * N * H * W, C), by row level, column level, image and position."""
    height, width = (known(dim, "the size") for dim in data.shape[2:])
    maps = []
    for a in range(height.bit_length()):
        by_rows = _maxima(ctx, data, 2**a, 0)
        maps += [_maxima(ctx, by_rows, 2**b, 1) for b in range(width.bit_length())]
    channels = data.shape[1]
    every = Symbol(f"windows({ctx.name})")
    stacked = ctx.emit("Concat", maps, (every, *data.shape[1:]), axis=0) if len(maps) > 1 else data
    last = ctx.transpose(stacked, (0, 2, 3, 1))
    shape: Shape = (Symbol(f"positions({ctx.name})"), channels)
    return ctx.emit("Reshape", [last, ctx.constant([-1, known(channels, "the number of channels")], "flat")], shape)


def _maxima(ctx: LayerContext, data: Value, window: int, axis: int) -> Value:
    """Return the maximum of the window that starts at each position; positions beyond the edge are ignored."""
    if window == 1:
        return data
    kernel, pads = [1, 1], [0, 0, 0, 0]
    kernel[axis], pads[2 + axis] = window, window - 1
    return ctx.emit("MaxPool", [data], data.shape, kernel_shape=kernel, pads=pads, strides=[1, 1])


def _look_up(ctx: LayerContext, table: Value, image: Value, rows: _Parts, columns: _Parts) -> Value:
    count, pooled_h, pooled_w = image.shape[0], rows.first.shape[1], columns.first.shape[1]
    plane = rows.size * columns.size
    images = ctx.emit("Shape", [ctx.bottoms[0]], (1,), np.int64, start=0, end=1)
    a_level = ctx.emit("Mul", [images, ctx.constant([plane], "plane")], (1,), np.int64)
    row_level = ctx.emit("Mul", [a_level, ctx.constant([columns.levels], "column_levels")], (1,), np.int64)
    # An index in the table is the sum of a row part, (R, h, 1), and a column part, (R, 1, w).
    base = _sum_of(ctx, _times(ctx, rows.level, row_level), _times(ctx, image, ctx.constant([plane], "plane")))
    width = ctx.constant([columns.size], "width")
    row_parts = [_sum_of(ctx, base, _times(ctx, start, width)) for start in (rows.first, rows.second)]
    across = _times(ctx, columns.level, a_level)
    column_parts = [_sum_of(ctx, across, start) for start in (columns.first, columns.second)]
    channels = table.shape[1]
    shape: tuple[Dim, ...] = (count, pooled_h, pooled_w)
    found = []
    for row in row_parts:
        tall = ctx.emit("Unsqueeze", [row, ctx.constant([2], "rows")], (count, pooled_h, 1), np.int64)
        for column in column_parts:
            wide = ctx.emit("Unsqueeze", [column, ctx.constant([1], "columns")], (count, 1, pooled_w), np.int64)
            index = ctx.emit("Add", [tall, wide], shape, np.int64)
            found.append(ctx.emit("Gather", [table, index], (*shape, channels), axis=0))
    best = ctx.transpose(ctx.emit("Max", found, (*shape, channels)), (0, 3, 1, 2))
    tall = ctx.emit("Unsqueeze", [rows.filled, ctx.constant([1, 3], "rows")], (count, 1, pooled_h, 1), np.bool_)
    wide = ctx.emit("Unsqueeze", [columns.filled, ctx.constant([1, 2], "columns")], (count, 1, 1, pooled_w), np.bool_)
    filled = ctx.emit("And", [tall, wide], (count, 1, pooled_h, pooled_w), np.bool_)
    return ctx.emit("Where", [filled, best, ctx.constant(0.0, "empty")], best.shape)


def _binary(ctx: LayerContext, op: str, left: Value, right: Value | float) -> Value:
    other = right if isinstance(right, Value) else ctx.constant(right, "number")
    return ctx.emit(op, [left, other], left.shape)


def _times(ctx: LayerContext, left: Value, right: Value) -> Value:
    return ctx.emit("Mul", [left, right], left.shape, np.int64)


def _sum_of(ctx: LayerContext, left: Value, right: Value) -> Value:
    return ctx.emit("Add", [left, right], left.shape, np.int64)
