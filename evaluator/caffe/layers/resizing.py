"""Upsample and Interp."""

from __future__ import annotations

import numpy as np

from ..graph import Value
from ..shapes import Dim, Symbol, known, text
from .converters import LayerContext, converts


@converts("Upsample")
def upsample(ctx: LayerContext) -> list[Value]:
    """Upsample by a whole factor: nearest neighbour (YOLO ports), or by a Pooling mask as second bottom (SegNet)."""
    data, param = ctx.bottom(1, 2), ctx.param.upsample_param
    if len(data.shape) != 4:
        ctx.fail(f"its bottom has {len(data.shape)} axes, not 4")
    both = param.HasField("scale_h") and param.HasField("scale_w")
    scale = [param.scale_h, param.scale_w] if both else [param.scale] * 2
    if min(scale) < 1 or max(scale) >= 2**16:
        ctx.fail(f"the scale is {scale}")
    if len(ctx.bottoms) == 2:
        return [_unpool(ctx, scale)]
    if param.upsample_h or param.upsample_w or param.pad_out_h or param.pad_out_w:
        ctx.fail("a size that is not a whole multiple needs a mask")
    if scale == [1, 1]:
        return [data]
    sizes = [_times(dim, factor) for dim, factor in zip(data.shape[2:], scale, strict=True)]
    inputs = [data, None, ctx.constant([1.0, 1.0, float(scale[0]), float(scale[1])], "scales")]
    return ctx.emit_many(
        "Resize",
        inputs,
        [((*data.shape[:2], *sizes), np.float32)],
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def _unpool(ctx: LayerContext, scale: list[int]) -> Value:
    """Add a MaxUnpool with the indices of the Pooling layer that made the mask."""
    data, param = ctx.bottoms[0], ctx.param.upsample_param
    if ctx.bottoms[1].name not in ctx.graph.masks:
        ctx.fail("its second bottom is not the mask of a MAX Pooling layer")
    pool, indices = ctx.graph.masks[ctx.bottoms[1].name]
    pooled = ctx.graph.values[pool.inputs[0]].shape
    if ctx.bottoms[1].shape != data.shape:
        ctx.fail(f"its mask has the shape {text(ctx.bottoms[1].shape)} but its bottom {text(data.shape)}")
    exact = [_times(dim, factor) for dim, factor in zip(data.shape[2:], scale, strict=True)]
    size = [
        param.upsample_h or _less(exact[0], param.pad_out_h),
        param.upsample_w or _less(exact[1], param.pad_out_w),
    ]
    if size != list(pooled[2:]):
        # A mask counts positions in the plane that was pooled; in a plane of another size they mean other positions.
        ctx.fail(f"its result has the size {text(size)} but its mask is for the size {text(pooled[2:])}")
    indices_value = Value(indices, data.shape, np.dtype(np.int64))
    # MaxUnpool's result has stride * (size - 1) + kernel rows. The kernel only sets this size; the indices alone give
    # the numbers' positions.
    kernel = [factor + _excess(ctx, *pair) for factor, *pair in zip(scale, size, exact, strict=True)]
    shape = (*data.shape[:2], *size)
    return ctx.emit_many("MaxUnpool", [data, indices_value], [(shape, np.float32)], kernel_shape=kernel, strides=scale)[
        0
    ]


def _excess(ctx: LayerContext, size: Dim, exact: Dim) -> int:
    return 0 if size == exact else known(size, "the size") - known(exact, "the size")


@converts("Interp")
def interp(ctx: LayerContext) -> list[Value]:
    """DeepLab's Interp: bilinear with aligned corners, to a given size or by zoom_factor and shrink_factor.

    A negative pad_beg or pad_end crops the bottom first.
    """
    data, param = ctx.bottom(), ctx.param.interp_param
    if len(data.shape) != 4:
        ctx.fail(f"its bottom has {len(data.shape)} axes, not 4")
    if param.pad_beg > 0 or param.pad_end > 0:
        ctx.fail("a positive pad is not supported")
    cropped = _cropped(ctx, data)
    sizes = [_interpolated(ctx, known(dim, "the size to interpolate"), i) for i, dim in enumerate(cropped.shape[2:])]
    if sizes == list(cropped.shape[2:]):
        return [cropped]
    inputs = [cropped, None, None, ctx.constant(sizes, "sizes")]
    return ctx.emit_many(
        "Resize",
        inputs,
        [((*data.shape[:2], *sizes), np.float32)],
        mode="linear",
        coordinate_transformation_mode="align_corners" if param.align_corners else "half_pixel",
        axes=[2, 3],
    )


def _cropped(ctx: LayerContext, data: Value) -> Value:
    param = ctx.param.interp_param
    if param.pad_beg == 0 and param.pad_end == 0:
        return data
    sizes = [known(dim, "the size to crop") + param.pad_beg + param.pad_end for dim in data.shape[2:]]
    if min(sizes) < 1:
        ctx.fail(f"the pads {param.pad_beg} and {param.pad_end} remove all of {text(data.shape)}")
    starts = [-param.pad_beg] * 2
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    inputs = [data, ctx.constant(starts, "starts"), ctx.constant(ends, "ends"), ctx.constant([2, 3], "axes")]
    return ctx.emit("Slice", inputs, (*data.shape[:2], *sizes))


def _interpolated(ctx: LayerContext, size: int, axis: int) -> int:
    param = ctx.param.interp_param
    zooms, shrinks = param.HasField("zoom_factor"), param.HasField("shrink_factor")
    if param.zoom_factor < 1 or param.shrink_factor < 1:
        ctx.fail(
            f"zoom_factor is {param.zoom_factor} and shrink_factor is {param.shrink_factor}; both must be at least 1"
        )
    if zooms or shrinks:
        if shrinks:
            size = (size - 1) // param.shrink_factor + 1
        return size + (size - 1) * (param.zoom_factor - 1) if zooms else size
    wanted = param.width if axis else param.height
    if wanted < 1:
        ctx.fail("needs height and width, zoom_factor or shrink_factor")
    return wanted


def _times(dim: Dim, factor: int) -> Dim:
    if isinstance(dim, int):
        return dim * factor
    return dim if factor == 1 else Symbol(f"{factor}*({dim})")


def _less(dim: Dim, by: bool) -> Dim:
    if isinstance(dim, int):
        return dim - int(by)
    return Symbol(f"({dim})-1") if by else dim
