"""Layers that combine blobs (Eltwise, Concat, Axpy) or pass them on (Dropout, Split, Silence)."""

from __future__ import annotations

import numpy as np

from ..caffe_pb2 import EltwiseParameter
from ..graph import Value
from ..shapes import Dim, Symbol, text
from .converters import LayerContext, converts


@converts("Dropout", "Split")
def alias(ctx: LayerContext) -> list[Value]:
    """Caffe's Split, and Dropout at test time: every top is an alias of the bottom."""
    return [ctx.bottom()] * len(ctx.tops)


@converts("Silence")
def silence(ctx: LayerContext) -> list[Value]:
    """Caffe's Silence: reads its bottoms, so that they are not outputs of the net."""
    return []


@converts("Eltwise")
def eltwise(ctx: LayerContext) -> list[Value]:
    """Caffe's Eltwise of two or more blobs with one shape: PROD, MAX, or SUM with optional coefficients."""
    first, param = ctx.bottom(2, None), ctx.param.eltwise_param
    for other in ctx.bottoms[1:]:
        if not ctx.same(first.shape, other.shape):
            ctx.fail(f"its bottoms have different shapes, {text(first.shape)} and {text(other.shape)}")
    if param.coeff and len(param.coeff) != len(ctx.bottoms):
        ctx.fail(f"has {len(param.coeff)} coefficients for {len(ctx.bottoms)} bottoms")
    if param.operation == EltwiseParameter.MAX:
        return [ctx.emit("Max", ctx.bottoms, first.shape)]
    if param.operation == EltwiseParameter.PROD:
        if param.coeff:
            ctx.fail("coefficients are only allowed for SUM")
        made = first
        for other in ctx.bottoms[1:]:
            made = ctx.emit("Mul", [made, other], first.shape)
        return [made]
    return [_sum(ctx, list(param.coeff) or [1.0] * len(ctx.bottoms))]


def _sum(ctx: LayerContext, coefficients: list[float]) -> Value:
    shape = ctx.bottoms[0].shape
    if coefficients == [1, -1]:
        return ctx.emit("Sub", ctx.bottoms, shape)
    terms = [
        term if coefficient == 1 else ctx.affine(term, np.asarray(coefficient), np.asarray(0.0))
        for term, coefficient in zip(ctx.bottoms, coefficients, strict=True)
    ]
    return ctx.emit("Add" if len(terms) == 2 else "Sum", terms, shape)


@converts("Axpy")
def axpy(ctx: LayerContext) -> list[Value]:
    """SENet's Axpy: a * x + y, with a (N, C) or (N, C, 1, 1), and x and y (N, C, H, W)."""
    factor, x, y = ctx.bottom(3, 3), ctx.bottoms[1], ctx.bottoms[2]
    if not ctx.same(x.shape, y.shape):
        ctx.fail(f"its second and third bottoms have different shapes, {text(x.shape)} and {text(y.shape)}")
    ones = (1,) * (len(x.shape) - 2)
    if factor.shape[:2] != x.shape[:2] or factor.shape[2:] not in ((), ones):
        ctx.fail(f"its first bottom has the shape {text(factor.shape)}, not one number per channel of {text(x.shape)}")
    wide = ctx.reshape(factor, factor.shape[:2] + ones)
    return [ctx.emit("Add", [ctx.emit("Mul", [x, wide], x.shape), y], x.shape)]


@converts("Concat")
def concat(ctx: LayerContext) -> list[Value]:
    """Caffe's Concat along `axis`, or `concat_dim` if only that is given. Constant bottoms give a constant."""
    first, param = ctx.bottom(1, None), ctx.param.concat_param
    if param.HasField("axis") and param.HasField("concat_dim"):
        ctx.fail("has both axis and concat_dim")
    axis = ctx.axis(param.concat_dim if param.HasField("concat_dim") else param.axis, first)
    if len(ctx.bottoms) == 1:
        return [first]
    ctx.refuse_batch(first, axis, "a concatenation")
    rest = first.shape[:axis] + first.shape[axis + 1 :]
    sizes: list[Dim] = []
    for value in ctx.bottoms:
        if len(value.shape) != len(first.shape) or not ctx.same(value.shape[:axis] + value.shape[axis + 1 :], rest):
            ctx.fail(
                f"its bottoms have the shapes {text(first.shape)} and {text(value.shape)}; "
                f"they can differ on axis {axis} only"
            )
        sizes.append(value.shape[axis])
    static = [dim for dim in sizes if isinstance(dim, int)]
    size: Dim = sum(static) if len(static) == len(sizes) else Symbol("+".join(map(str, sizes)))
    shape = (*first.shape[:axis], size, *first.shape[axis + 1 :])
    arrays = [ctx.graph.constants.get(value.name) for value in ctx.bottoms]
    known = [array for array in arrays if array is not None]
    if len(known) == len(arrays):
        return [ctx.constant(np.concatenate(known, axis), "constant")]
    return [ctx.emit("Concat", ctx.bottoms, shape, axis=axis)]
