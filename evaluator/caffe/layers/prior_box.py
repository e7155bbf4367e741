"""SSD's PriorBox."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..caffe_pb2 import PriorBoxParameter
from ..graph import FLOAT, Value
from ..shapes import known
from .converters import LayerContext, converts

# SSD nets have about ten thousand priors. Without limits, a small prototxt could ask for any amount of memory.
_MAX_NUMBERS = 2**24
_MAX_PER_POSITION = 2**12


@converts("PriorBox")
def prior_box(ctx: LayerContext) -> list[Value]:
    """SSD's PriorBox: a constant (1, 2, H * W * priors * 4) with the corners, relative to the image, and the variances.

    Every position of the first bottom has, for every min_size: a square of min_size, a square of
    sqrt(min_size * max_size), then one box per aspect ratio and, with `flip`, per inverse ratio.

    Sources: Liu and others, SSD, 2016, section 2.2; github.com/weiliu89/caffe, branch ssd, prior_box_layer.cpp.
    """
    feature, image = ctx.bottom(2, 2), ctx.bottoms[1]
    if len(feature.shape) != 4 or len(image.shape) != 4:
        ctx.fail("its bottoms must have four axes each")
    rows, columns = (known(dim, "the size of a PriorBox's bottom") for dim in feature.shape[2:])
    height, width = _image_size(ctx, image)
    step_y, step_x = _steps(ctx, height / rows, width / columns)
    sizes = _sizes(ctx)
    if rows * columns * len(sizes) * 8 > _MAX_NUMBERS:
        ctx.fail(f"{rows * columns * len(sizes)} priors exceed the limit of {_MAX_NUMBERS // 8}")
    ctx.graph.check_budget(rows * columns * len(sizes) * 8 * FLOAT.itemsize)
    x = (np.arange(columns) + ctx.param.prior_box_param.offset) * step_x
    y = (np.arange(rows) + ctx.param.prior_box_param.offset) * step_y
    half = np.asarray(sizes) / 2
    priors = np.empty((2, rows, columns, len(sizes), 4), FLOAT)
    for corner, sign in enumerate((-1, 1)):
        # All rows share one set of x edges, and all columns one set of y edges.
        priors[0, ..., 2 * corner] = _edges(ctx, x, sign * half[:, 0], width)
        priors[0, ..., 2 * corner + 1] = _edges(ctx, y, sign * half[:, 1], height)[:, None]
    priors[1] = _variance(ctx)
    return [ctx.constant(priors.reshape(1, 2, -1), "priors")]


def _edges(ctx: LayerContext, centres: NDArray[Any], offsets: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Return the priors' edges relative to the image size, (centres, offsets)."""
    edges = (centres[:, None] + offsets) / size
    return edges.clip(0, 1) if ctx.param.prior_box_param.clip else edges


def _image_size(ctx: LayerContext, image: Value) -> tuple[int, int]:
    param = ctx.param.prior_box_param
    if param.HasField("img_size") and (param.HasField("img_h") or param.HasField("img_w")):
        ctx.fail("has both img_size and img_h or img_w")
    height, width = param.img_size or param.img_h, param.img_size or param.img_w
    if height and width:
        return height, width
    return known(image.shape[2], "the image's height"), known(image.shape[3], "the image's width")


def _steps(ctx: LayerContext, step_y: float, step_x: float) -> tuple[float, float]:
    param = ctx.param.prior_box_param
    if param.HasField("step"):
        if param.HasField("step_h") or param.HasField("step_w"):
            ctx.fail("has both step and step_h or step_w")
        given = (param.step, param.step)
    else:
        given = (param.step_h, param.step_w)
    if min(given) < 0 or not np.isfinite(given).all():
        ctx.fail(f"the step is {given}")
    return (given[0], given[1]) if given[0] and given[1] else (step_y, step_x)


def _sizes(ctx: LayerContext) -> list[tuple[float, float]]:
    """Return the (width, height) of every prior at one position, in pixels."""
    param = ctx.param.prior_box_param
    if not param.min_size or not _positive(param.min_size):
        ctx.fail("needs a min_size greater than 0")
    if param.max_size and len(param.max_size) != len(param.min_size):
        ctx.fail(f"has {len(param.min_size)} min_size but {len(param.max_size)} max_size")
    ratios = _ratios(ctx, param)
    if len(param.min_size) * (len(ratios) + 2) > _MAX_PER_POSITION:
        ctx.fail(f"{len(param.min_size)} min_size with {len(ratios)} aspect ratios exceed the limit of priors")
    sizes: list[tuple[float, float]] = []
    for i, least in enumerate(param.min_size):
        sizes.append((least, least))
        if param.max_size:
            if not param.max_size[i] > least:
                ctx.fail(f"max_size {param.max_size[i]} must be greater than min_size {least}")
            middle = float(np.sqrt(least * param.max_size[i]))
            sizes.append((middle, middle))
        sizes += [(least * root, least / root) for root in np.sqrt(ratios)]
    return sizes


def _ratios(ctx: LayerContext, param: PriorBoxParameter) -> list[float]:
    """Return the distinct aspect ratios other than 1."""
    if not _positive(param.aspect_ratio) or len(param.aspect_ratio) > 1000:
        ctx.fail("every aspect_ratio must be greater than 0, and there can be at most 1000")
    ratios = [1.0]
    for ratio in param.aspect_ratio:
        if all(abs(ratio - other) >= 1e-6 for other in ratios):
            ratios += [ratio, 1 / ratio] if param.flip else [ratio]
    return [ratio for ratio in ratios if abs(ratio - 1) >= 1e-6]


def _variance(ctx: LayerContext) -> NDArray[np.float64]:
    variance = list(ctx.param.prior_box_param.variance) or [0.1]
    if len(variance) not in (1, 4) or not _positive(variance):
        ctx.fail(f"has {len(variance)} variances; needs one or four, all greater than 0")
    return np.asarray(variance)


def _positive(numbers: Iterable[float]) -> bool:
    array = np.array(list(numbers), np.float64)
    return bool(np.all((array > 0) & np.isfinite(array)))
