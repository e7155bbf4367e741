"""Softmax."""

from __future__ import annotations

from ..graph import Value
from .converters import LayerContext, converts


@converts("Softmax", "SoftmaxWithLoss")
def softmax(ctx: LayerContext) -> list[Value]:
    """Caffe's Softmax along `axis`. A SoftmaxWithLoss is converted to a Softmax of its first bottom."""
    data = ctx.bottom()
    axis = ctx.axis(ctx.param.softmax_param.axis, data)
    ctx.refuse_batch(data, axis, "a softmax")
    return [ctx.emit("Softmax", [data], data.shape, axis=axis)]
