"""InnerProduct."""

from __future__ import annotations

from ..graph import Value
from ..shapes import known_product, product
from .converters import LayerContext, converts


@converts("InnerProduct")
def inner_product(ctx: LayerContext) -> list[Value]:
    """Caffe's InnerProduct, (N, ...) -> (N, num_output): flatten the axes from `axis` on, and multiply by the weight.

    The weight is (num_output, K), or (K, num_output) with `transpose`; K is the flattened size.
    """
    data = ctx.bottom()
    param = ctx.param.inner_product_param
    axis = ctx.axis(param.axis, data)
    if axis == 0:
        ctx.refuse_batch(data, 0, "an inner product")
    outputs = param.num_output
    if not 1 <= outputs < 2**31:
        ctx.fail(f"num_output is {outputs}")
    inner = known_product(data.shape[axis:], "the size of an inner product's input")
    weight = ctx.blob(0, (inner, outputs) if param.transpose else (outputs, inner))
    inputs = [ctx.constant(weight, "weight")]
    if param.bias_term:
        inputs.append(ctx.constant(ctx.blob(1, (outputs,)), "bias"))
    # Gemm accepts only matrices, so all leading axes become rows.
    rows = product(data.shape[:axis])
    flat = ctx.reshape(data, (rows, inner))
    made = ctx.emit("Gemm", [flat, *inputs], (rows, outputs), transB=int(not param.transpose))
    return [ctx.reshape(made, (*data.shape[:axis], outputs))]
