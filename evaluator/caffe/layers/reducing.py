"""ArgMax and Reduction."""

from __future__ import annotations

import numpy as np

from ..caffe_pb2 import ReductionParameter
from ..graph import Value
from ..shapes import Shape, known, known_product
from .converters import LayerContext, converts

_REDUCTIONS = {
    ReductionParameter.SUM: "ReduceSum",
    ReductionParameter.ASUM: "ReduceL1",
    ReductionParameter.SUMSQ: "ReduceSumSquare",
    ReductionParameter.MEAN: "ReduceMean",
}


@converts("Reduction")
def reduction(ctx: LayerContext) -> list[Value]:
    """Caffe's Reduction: SUM, ASUM, SUMSQ or MEAN over all axes from `axis` on, times coeff."""
    data, param = ctx.bottom(), ctx.param.reduction_param
    axis = ctx.axis(param.axis, data)
    for i in range(axis, len(data.shape)):
        ctx.refuse_batch(data, i, "a reduction")
    axes = ctx.constant(list(range(axis, len(data.shape))), "axes")
    made = ctx.emit(_REDUCTIONS[param.operation], [data, axes], data.shape[:axis], keepdims=0)
    if param.coeff == 1:
        return [made]
    return [ctx.affine(made, np.asarray(param.coeff), np.asarray(0.0))]


@converts("ArgMax")
def arg_max(ctx: LayerContext) -> list[Value]:
    """Caffe's ArgMax; indices are float32.

    With `axis`: the top_k indices along it, or their values with out_max_val. Without `axis`: the top_k of all numbers
    of an image, as (N, 1, top_k, 1) indices, or (N, 2, top_k, 1) indices and values with out_max_val; bottoms with
    fewer than four axes give three axes. Among equal numbers, Caffe selects the last.
    """
    data, param = ctx.bottom(), ctx.param.argmax_param
    rank = len(data.shape)
    if param.HasField("axis"):
        axis = ctx.axis(param.axis, data)
        ctx.refuse_batch(data, axis, "an argmax")
        size = known(data.shape[axis], "the size of the axis")
        indices, values = _best(ctx, data, axis, size)
        return [values if param.out_max_val else indices]
    if rank < 2:
        ctx.fail("its bottom has only the batch axis")
    size = known_product(data.shape[1:], "the size of an image")
    indices, values = _best(ctx, ctx.reshape(data, (data.shape[0], size)), 1, size)
    ones = (1,) * (max(rank, 3) - 3)
    flat: Shape = (data.shape[0], 1, param.top_k, *ones)
    if not param.out_max_val:
        return [ctx.reshape(indices, flat)]
    both = [ctx.reshape(value, flat) for value in (indices, values)]
    return [ctx.emit("Concat", both, (data.shape[0], 2, param.top_k, *ones), axis=1)]


def _best(ctx: LayerContext, data: Value, axis: int, size: int) -> tuple[Value, Value]:
    """Return the top_k indices along an axis, as float32, and their values."""
    top_k = ctx.param.argmax_param.top_k
    if not 1 <= top_k <= size:
        ctx.fail(f"top_k is {top_k} but must be 1 to {size}")
    shape = (*data.shape[:axis], top_k, *data.shape[axis + 1 :])
    if top_k == 1:
        best = ctx.emit("ArgMax", [data], shape, np.int64, axis=axis, keepdims=1, select_last_index=1)
        values = ctx.emit("ReduceMax", [data, ctx.constant([axis], "axes")], shape, keepdims=1)
    else:
        # TopK selects the first of equal numbers and Caffe the last, so reverse the axis first.
        ends = [ctx.constant([number], name) for number, name in ((-1, "start"), (-(2**31), "end"), (axis, "axis"))]
        backward = ctx.emit("Slice", [data, *ends, ctx.constant([-1], "step")], data.shape)
        values, position = ctx.emit_many(
            "TopK", [backward, ctx.constant([top_k], "k")], [(shape, np.float32), (shape, np.int64)], axis=axis
        )
        best = ctx.emit("Sub", [ctx.constant(size - 1, "last"), position], shape, np.int64)
    return ctx.emit("Cast", [best], shape, to=1), values
