"""BatchNorm, Scale, Bias, BN, LRN, MVN and Normalize."""

from __future__ import annotations

import numpy as np

from ..caffe_pb2 import BNParameter, LRNParameter
from ..graph import Value
from ..shapes import BATCH, Symbol, known, text
from .converters import LayerContext, converts


@converts("BatchNorm")
def batch_norm(ctx: LayerContext) -> list[Value]:
    """Caffe's BatchNorm at test time: (x - mean) / sqrt(variance + eps) per channel.

    The stored mean and variance are divided by blob 2. If blob 2 is 0, as in an untrained net, both are 0.
    """
    data, param = ctx.bottom(), ctx.param.batch_norm_param
    if param.HasField("use_global_stats") and not param.use_global_stats:
        ctx.fail("use_global_stats is false, so it would mix the images of a batch")
    channels = known(data.shape[1], "the number of channels") if len(data.shape) > 1 else 1
    factor = float(ctx.blob(2, (1,))[0])
    share = 0.0 if factor == 0 else 1 / factor
    mean = ctx.blob(0, (channels,)).astype(np.float64) * share
    variance = ctx.blob(1, (channels,)).astype(np.float64) * share
    scale = 1 / np.sqrt(variance + param.eps)
    return [ctx.affine(data, scale, -mean * scale)]


@converts("BN")
def bn(ctx: LayerContext) -> list[Value]:
    """SegNet's BN in a deploy net: x * scale + shift per channel. Both already include the batch statistics."""
    data = ctx.bottom()
    if ctx.param.bn_param.HasField("bn_mode") and ctx.param.bn_param.bn_mode != BNParameter.INFERENCE:
        ctx.fail("bn_mode is LEARN, so it would mix the images of a batch")
    if ctx.blob_count() > 2:
        ctx.fail(f"has {ctx.blob_count()} weight blobs; only SegNet's BN with scale and shift is supported")
    if len(data.shape) < 2:
        ctx.fail("its bottom has no channel axis")
    channels = known(data.shape[1], "the number of channels")
    scale, shift = (ctx.blob(i, (channels,)).astype(np.float64) for i in range(2))
    return [ctx.affine(data, scale, shift)]


@converts("Scale")
def scale(ctx: LayerContext) -> list[Value]:
    """Caffe's Scale: x * scale (+ bias), where scale is a weight or the second bottom.

    A weight covers `num_axes` axes from `axis` on; a second bottom covers as many axes as it has.
    """
    data, param = ctx.bottom(1, 2), ctx.param.scale_param
    if len(ctx.bottoms) == 2:
        axis = ctx.axis(param.axis, data)
        factor = _broadcast(ctx, data, ctx.bottoms[1], axis)
        scaled = ctx.emit("Mul", [data, factor], data.shape)
        if not param.bias_term:
            return [scaled]
        covered = _covered(ctx, data, axis, len(ctx.bottoms[1].shape))
        return [_add_weight(ctx, scaled, 0, axis, covered)]
    axis, covered = _axes(ctx, data, param.axis, param.num_axes)
    factors = ctx.blob(0, covered)
    if _is_per_channel(axis, covered):
        shifts = ctx.blob(1, covered) if param.bias_term else np.zeros_like(factors)
        return [ctx.affine(data, factors.astype(np.float64), shifts.astype(np.float64))]
    scaled = ctx.emit("Mul", [data, ctx.constant(_padded(factors, data, axis), "scale")], data.shape)
    return [_add_weight(ctx, scaled, 1, axis, covered) if param.bias_term else scaled]


@converts("Bias")
def bias(ctx: LayerContext) -> list[Value]:
    """Caffe's Bias: x + bias, where bias is a weight or the second bottom; see `scale` for the axes."""
    data, param = ctx.bottom(1, 2), ctx.param.bias_param
    if len(ctx.bottoms) == 2:
        axis = ctx.axis(param.axis, data)
        return [ctx.emit("Add", [data, _broadcast(ctx, data, ctx.bottoms[1], axis)], data.shape)]
    axis, covered = _axes(ctx, data, param.axis, param.num_axes)
    if _is_per_channel(axis, covered):
        shift = ctx.blob(0, covered).astype(np.float64)
        return [ctx.affine(data, np.ones_like(shift), shift)]
    return [_add_weight(ctx, data, 0, axis, covered)]


@converts("LRN")
def lrn(ctx: LayerContext) -> list[Value]:
    """Caffe's LRN.

    ACROSS_CHANNELS: x * (k + alpha/size * sum of squares)^-beta, over `size` neighbouring channels.
    WITHIN_CHANNEL: x * (1 + alpha * mean of squares)^-beta, over a square of positions; k is ignored.
    """
    data, param = ctx.bottom(), ctx.param.lrn_param
    size = param.local_size
    if len(data.shape) != 4:
        ctx.fail(f"its bottom has {len(data.shape)} axes, not 4")
    if size % 2 == 0 or size >= 2**31:
        ctx.fail(f"local_size is {size} but must be odd")
    if not param.alpha >= 0 or not param.beta >= 0:
        ctx.fail(f"alpha is {param.alpha} and beta is {param.beta}; onnxruntime supports no negative values")
    across = param.norm_region == LRNParameter.ACROSS_CHANNELS
    if param.alpha == 0 or param.beta == 0:
        # onnxruntime does not support 0 either. Then the formula reduces to a factor.
        constant = np.float64(param.k) ** -param.beta if across else 1.0
        return [ctx.affine(data, np.asarray(constant), np.asarray(0.0))]
    if across:
        return [ctx.emit("LRN", [data], data.shape, alpha=param.alpha, beta=param.beta, bias=param.k, size=size)]
    squares = ctx.emit("Mul", [data, data], data.shape)
    mean = ctx.emit(
        "AveragePool", [squares], data.shape, kernel_shape=[size] * 2, pads=[size // 2] * 4, count_include_pad=1
    )
    base = ctx.affine(mean, np.asarray(param.alpha), np.asarray(1.0))
    return [ctx.emit("Mul", [data, ctx.emit("Pow", [base, ctx.constant(-param.beta, "beta")], data.shape)], data.shape)]


@converts("MVN")
def mvn(ctx: LayerContext) -> list[Value]:
    """Caffe's MVN: (x - mean) / (sqrt(variance) + eps), over H and W, or C, H and W with across_channels."""
    data, param = ctx.bottom(), ctx.param.mvn_param
    rank = len(data.shape)
    if not 2 <= rank <= 4:
        ctx.fail(f"its bottom has {rank} axes, not 2 to 4")
    first = 1 if param.across_channels else 2
    if first == rank:
        ctx.fail("its bottom has no spatial axes")
    axes = ctx.constant(list(range(first, rank)), "axes")
    single = data.shape[:first] + (1,) * (rank - first)
    mean = ctx.emit("ReduceMean", [data, axes], single, keepdims=1)
    centred = ctx.emit("Sub", [data, mean], data.shape)
    if not param.normalize_variance:
        return [centred]
    variance = ctx.emit("ReduceMean", [ctx.emit("Mul", [centred, centred], data.shape), axes], single, keepdims=1)
    deviation = ctx.emit("Sqrt", [variance], single)
    return [
        ctx.emit("Div", [centred, ctx.emit("Add", [deviation, ctx.constant(param.eps, "eps")], single)], data.shape)
    ]


@converts("Normalize")
def normalize(ctx: LayerContext) -> list[Value]:
    """SSD's Normalize: x / sqrt(sum of squares + eps) * scale, over C, or C, H and W with across_spatial."""
    data, param = ctx.bottom(), ctx.param.norm_param
    if len(data.shape) != 4:
        ctx.fail(f"its bottom has {len(data.shape)} axes, not 4")
    channels = known(data.shape[1], "the number of channels")
    factors = ctx.blob(0, (1,) if param.channel_shared else (channels,))
    axes = [1, 2, 3] if param.across_spatial else [1]
    single = (data.shape[0], 1, *((1, 1) if param.across_spatial else data.shape[2:]))
    total = ctx.emit("ReduceSumSquare", [data, ctx.constant(axes, "axes")], single, keepdims=1)
    root = ctx.emit("Sqrt", [ctx.emit("Add", [total, ctx.constant(param.eps, "eps")], single)], single)
    unit = ctx.emit("Div", [data, root], data.shape)
    factor = factors.reshape(()) if param.channel_shared else factors
    return [ctx.affine(unit, factor.astype(np.float64), np.asarray(0.0))]


def _axes(ctx: LayerContext, data: Value, axis: int, num_axes: int) -> tuple[int, tuple[int, ...]]:
    """Return the first axis that a weight of Scale or Bias covers, and the weight's shape."""
    if num_axes == 0:
        return 0, ()
    if num_axes < -1:
        ctx.fail(f"num_axes is {num_axes}")
    start = ctx.axis(axis, data)
    stop = len(data.shape) if num_axes == -1 else start + num_axes
    if stop > len(data.shape):
        ctx.fail(f"num_axes {num_axes} from axis {start} exceeds the {len(data.shape)} axes of the bottom")
    return start, _covered(ctx, data, start, stop - start)


def _covered(ctx: LayerContext, data: Value, axis: int, number: int) -> tuple[int, ...]:
    covered = []
    for dim in data.shape[axis : axis + number]:
        if dim == Symbol(BATCH) and ctx.batch != 1:
            ctx.fail("its weights depend on the batch size")
        covered.append(1 if dim == Symbol(BATCH) else known(dim, "the size of its weights"))
    return tuple(covered)


def _is_per_channel(axis: int, covered: tuple[int, ...]) -> bool:
    return covered == () or (axis == 1 and len(covered) == 1)


def _padded(weight: np.ndarray, data: Value, axis: int) -> np.ndarray:
    return weight.reshape(weight.shape + (1,) * (len(data.shape) - axis - weight.ndim))


def _add_weight(ctx: LayerContext, data: Value, index: int, axis: int, covered: tuple[int, ...]) -> Value:
    weight = _padded(ctx.blob(index, covered), data, axis)
    return ctx.emit("Add", [data, ctx.constant(weight, "bias")], data.shape)


def _broadcast(ctx: LayerContext, data: Value, other: Value, axis: int) -> Value:
    """Append ones to the shape of the second bottom, so that it broadcasts to `data` from `axis` on."""
    if not other.shape:
        return other
    stop = axis + len(other.shape)
    if not ctx.same(data.shape[axis:stop], other.shape):
        ctx.fail(f"its second bottom {text(other.shape)} does not match {text(data.shape)} from axis {axis} on")
    return ctx.reshape(other, other.shape + (1,) * (len(data.shape) - stop))
