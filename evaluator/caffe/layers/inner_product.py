"""InnerProduct."""

from __future__ import annotations

from ..graph import Value
from ..shapes import known_product, product
from .converters import LayerContext, converts


@converts("InnerProduct")
def inner_product(ctx: LayerContext) -> list[Value]:
    """Caffe's InnerProduct: the axes from `axis` on are flattened and multiplied, (N, ...) -> (N, num_output).

    The weight is (num_output, K), or (K, num_output) with `transpose`, where K is the flattened size.
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
    # Gemm is for matrices only; more leading axes are rows like any other.
    rows = product(data.shape[:axis])
    flat = ctx.reshape(data, (rows, inner))
    made = ctx.emit("Gemm", [flat, *inputs], (rows, outputs), transB=int(not param.transpose))
    return [ctx.reshape(made, (*data.shape[:axis], outputs))]
