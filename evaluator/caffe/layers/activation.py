"""Activations: element-wise functions of one input."""

from __future__ import annotations

import math

import numpy as np

from ..graph import Value, per_channel
from ..shapes import known
from .converters import LayerContext, converts


@converts("ReLU")
def relu(ctx: LayerContext) -> list[Value]:
    """Caffe's ReLU: max(x, 0) + negative_slope * min(x, 0)."""
    data, slope = ctx.bottom(), ctx.param.relu_param.negative_slope
    if slope == 0:
        return [ctx.emit("Relu", [data], data.shape)]
    return [ctx.emit("LeakyRelu", [data], data.shape, alpha=slope)]


@converts("ReLU6")
def relu6(ctx: LayerContext) -> list[Value]:
    """ReLU6 of the MobileNet forks: min(max(x, 0), 6)."""
    data = ctx.bottom()
    if ctx.param.relu6_param.negative_slope or ctx.param.relu_param.negative_slope:
        ctx.fail("negative_slope is not supported")
    return [ctx.emit("Clip", [data, ctx.constant(0.0, "min"), ctx.constant(6.0, "max")], data.shape)]


@converts("Clip")
def clip(ctx: LayerContext) -> list[Value]:
    """Caffe's Clip: min(max(x, min), max)."""
    data, param = ctx.bottom(), ctx.param.clip_param
    if not param.HasField("min") or not param.HasField("max"):
        ctx.fail("needs both min and max")
    return [ctx.emit("Clip", [data, ctx.constant(param.min, "min"), ctx.constant(param.max, "max")], data.shape)]


@converts("PReLU")
def prelu(ctx: LayerContext) -> list[Value]:
    """Caffe's PReLU: max(x, 0) + slope * min(x, 0), with one slope per channel (axis 1) or one if channel_shared."""
    data = ctx.bottom()
    if len(data.shape) < 2:
        ctx.fail("its bottom has no channel axis")
    if ctx.param.prelu_param.channel_shared:
        slope = ctx.blob(0, ()).reshape(1)
    else:
        slope = per_channel(ctx.blob(0, (known(data.shape[1], "the number of channels"),)), len(data.shape))
    return [ctx.emit("PRelu", [data, ctx.constant(slope, "slope")], data.shape)]


@converts("ELU")
def elu(ctx: LayerContext) -> list[Value]:
    """Caffe's ELU: x if x > 0, else alpha * (e^x - 1)."""
    data = ctx.bottom()
    return [ctx.emit("Elu", [data], data.shape, alpha=ctx.param.elu_param.alpha)]


@converts("Sigmoid", "TanH", "AbsVal", "BNLL")
def named(ctx: LayerContext) -> list[Value]:
    """Caffe's Sigmoid, TanH, AbsVal, and BNLL: log(1 + e^x)."""
    data = ctx.bottom()
    op = {"Sigmoid": "Sigmoid", "TanH": "Tanh", "AbsVal": "Abs", "BNLL": "Softplus"}[ctx.type]
    return [ctx.emit(op, [data], data.shape)]


@converts("Swish")
def swish(ctx: LayerContext) -> list[Value]:
    """Caffe's Swish: x * sigmoid(beta * x)."""
    data, beta = ctx.bottom(), ctx.param.swish_param.beta
    scaled = data if beta == 1 else ctx.emit("Mul", [data, ctx.constant(beta, "beta")], data.shape)
    gate = ctx.emit("Sigmoid", [scaled], data.shape)
    return [ctx.emit("Mul", [data, gate], data.shape)]


@converts("Threshold")
def threshold(ctx: LayerContext) -> list[Value]:
    """Caffe's Threshold: 1 if x > threshold, else 0."""
    data = ctx.bottom()
    limit = ctx.constant(ctx.param.threshold_param.threshold, "threshold")
    above = ctx.emit("Greater", [data, limit], data.shape, np.bool_)
    return [ctx.emit("Cast", [above], data.shape, to=1)]


@converts("Power")
def power(ctx: LayerContext) -> list[Value]:
    """Caffe's Power: (shift + scale * x) ^ power; a constant if power or scale is 0."""
    data, param = ctx.bottom(), ctx.param.power_param
    if param.power == 0:
        return [_filled_like(ctx, data, 1.0)]
    if param.scale == 0:
        return [_filled_like(ctx, data, float(np.power(np.float64(param.shift), param.power)))]
    base = _scaled(ctx, data, param.scale, param.shift)
    match param.power:
        case 1:
            return [base]
        case 2:
            return [ctx.emit("Mul", [base, base], data.shape)]
        case 0.5:
            return [ctx.emit("Sqrt", [base], data.shape)]
        case -1:
            return [ctx.emit("Reciprocal", [base], data.shape)]
    return [ctx.emit("Pow", [base, ctx.constant(param.power, "power")], data.shape)]


@converts("Exp")
def exp(ctx: LayerContext) -> list[Value]:
    """Caffe's Exp: base ^ (shift + scale * x). A base of -1 means e."""
    data, param = ctx.bottom(), ctx.param.exp_param
    factor = _log_of_base(ctx, param.base)
    exponent = _scaled(ctx, data, param.scale * factor, param.shift * factor)
    return [ctx.emit("Exp", [exponent], data.shape)]


@converts("Log")
def log(ctx: LayerContext) -> list[Value]:
    """Caffe's Log: the logarithm of shift + scale * x to the given base. A base of -1 means e."""
    data, param = ctx.bottom(), ctx.param.log_param
    factor = _log_of_base(ctx, param.base)
    if factor == 0:
        ctx.fail("the base is 1, which has no logarithm")
    natural = ctx.emit("Log", [_scaled(ctx, data, param.scale, param.shift)], data.shape)
    return [_scaled(ctx, natural, 1 / factor, 0.0)]


def _log_of_base(ctx: LayerContext, base: float) -> float:
    if base == -1:
        return 1.0
    if not base > 0 or math.isinf(base):
        ctx.fail(f"the base is {base} but must be positive and finite, or -1")
    return math.log(base)


def _scaled(ctx: LayerContext, data: Value, scale: float, shift: float) -> Value:
    if scale == 1 and shift == 0:
        return data
    return ctx.affine(data, np.asarray(scale), np.asarray(shift))


def _filled_like(ctx: LayerContext, data: Value, number: float) -> Value:
    shape = ctx.emit("Shape", [data], (len(data.shape),), np.int64)
    return ctx.emit("ConstantOfShape", [shape], data.shape, value=np.array([number], np.float32))
