"""Layers that cut or repeat a blob: Slice, Crop, Tile."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ..graph import Value
from ..shapes import Dim, Symbol, known
from .converters import LayerContext, converts


@converts("Slice")
def slice_(ctx: LayerContext) -> list[Value]:
    """Caffe's Slice along `axis`, or `slice_dim` if only that is given: at the slice points, or into equal parts."""
    data, param = ctx.bottom(), ctx.param.slice_param
    if param.HasField("axis") and param.HasField("slice_dim"):
        ctx.fail("has both axis and slice_dim")
    axis = ctx.axis(param.slice_dim if param.HasField("slice_dim") else param.axis, data)
    parts = len(ctx.tops)
    if parts == 1 and not param.slice_point:
        return [data]
    ctx.refuse_batch(data, axis, "a slice")
    size = known(data.shape[axis], "the size to slice")
    if param.slice_point:
        cuts = [0, *param.slice_point, size]
        sizes = [stop - start for start, stop in pairwise(cuts)]
        if len(sizes) != parts or min(sizes) < 1:
            ctx.fail(f"the slice points {list(param.slice_point)[:8]} do not split a size of {size} into {parts}")
    elif parts == 0 or size % parts:
        ctx.fail(f"a size of {size} cannot be split into {parts} equal parts")
    else:
        sizes = [size // parts] * parts
    outputs = [((*data.shape[:axis], length, *data.shape[axis + 1 :]), np.float32) for length in sizes]
    return ctx.emit_many("Split", [data, ctx.constant(sizes, "sizes")], outputs, axis=axis)


@converts("Crop")
def crop(ctx: LayerContext) -> list[Value]:
    """Caffe's Crop: cut the first bottom to the second bottom's size, on `axis` and all axes after it.

    The offsets are one number for all these axes, or one per axis.
    """
    data, param = ctx.bottom(2, 2), ctx.param.crop_param
    like = ctx.bottoms[1].shape
    axis = ctx.axis(param.axis, data)
    number = len(data.shape) - axis
    if len(like) != len(data.shape):
        ctx.fail(f"its bottoms have {len(data.shape)} and {len(like)} axes")
    if len(param.offset) not in (0, 1, number):
        ctx.fail(f"has {len(param.offset)} offsets for {number} axes")
    offsets = list(param.offset or [0]) * (1 if len(param.offset) == number else number)
    axes = []
    for i, offset in zip(range(axis, len(like)), offsets, strict=True):
        if _is_cut(ctx, data.shape[i], like[i], offset, i):
            axes.append(i)
    if not axes:
        return [data]
    shape = (*data.shape[:axis], *like[axis:])
    starts = [offsets[i - axis] for i in axes]
    ends = _ends(ctx, axes, starts, like)
    inputs = [data, ctx.constant(starts, "starts"), ends, ctx.constant(axes, "axes")]
    return [ctx.emit("Slice", inputs, shape)]


def _is_cut(ctx: LayerContext, size: Dim, wanted: Dim, offset: int, axis: int) -> bool:
    if isinstance(size, int) and isinstance(wanted, int):
        if offset + wanted > size:
            ctx.fail(f"a crop of {wanted} from offset {offset} exceeds the size {size} of axis {axis}")
        return size != wanted
    if size == wanted and offset == 0:
        return False
    if axis == 0:
        ctx.fail("cropping the batch axis would mix the images of a batch")
    if isinstance(size, int) or isinstance(wanted, int) or not ctx.one_size():
        ctx.fail(f"a crop of {wanted} from offset {offset} might exceed the size {size} of axis {axis} at run time")
    return True


def _ends(ctx: LayerContext, axes: list[int], starts: list[int], like: tuple[Dim, ...]) -> Value:
    sizes = [like[i] for i in axes]
    if not any(isinstance(size, Symbol) for size in sizes):
        return ctx.constant(
            [start + known(size, "the size") for start, size in zip(starts, sizes, strict=True)], "ends"
        )
    shape = ctx.emit("Shape", [ctx.bottoms[1]], (len(like),), np.int64)
    wanted = ctx.emit("Gather", [shape, ctx.constant(axes, "axes")], (len(axes),), np.int64, axis=0)
    return ctx.emit("Add", [wanted, ctx.constant(starts, "starts")], (len(axes),), np.int64)


@converts("Tile")
def tile(ctx: LayerContext) -> list[Value]:
    """Caffe's Tile: repeat the blob `tiles` times along `axis`."""
    data, param = ctx.bottom(), ctx.param.tile_param
    axis = ctx.axis(param.axis, data)
    if not 1 <= param.tiles < 2**31:
        ctx.fail(f"tiles is {param.tiles}")
    if param.tiles == 1:
        return [data]
    ctx.refuse_batch(data, axis, "tiling")
    size = data.shape[axis]
    tiled: Dim = size * param.tiles if isinstance(size, int) else Symbol(f"{param.tiles}*({size})")
    shape = (*data.shape[:axis], tiled, *data.shape[axis + 1 :])
    repeats = [param.tiles if i == axis else 1 for i in range(len(data.shape))]
    return [ctx.emit("Tile", [data, ctx.constant(repeats, "repeats")], shape)]
