"""Pooling."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..caffe_pb2 import PoolingParameter
from ..graph import FLOAT, Value
from ..shapes import Dim, Symbol, known
from .converters import LayerContext, converts

# The largest output, per axis, for which the windows' shares of pixels become a constant. Real images are smaller.
_MAX_SHARES = 2**12


@converts("Pooling")
def pooling(ctx: LayerContext) -> list[Value]:
    """Caffe's Pooling of (N, C, H, W): MAX, optionally with a mask as second top, or AVE.

    The output has ceil((H + 2p - k) / s) + 1 rows, or one row less if the last window would start beyond the image and
    its leading padding. ONNX's ceil_mode has this meaning since opset 22. AVE divides by the size of the window,
    including padding but without positions beyond the padded image.

    Source: BVLC Caffe, pooling_layer.cpp.
    """
    data = ctx.bottom()
    param = ctx.param.pooling_param
    if len(data.shape) != 4:
        ctx.fail(f"its bottom has {len(data.shape)} axes, not 4")
    if param.pool == PoolingParameter.STOCHASTIC:
        ctx.fail("stochastic pooling is not supported")
    window = _Window(ctx, param, data)
    op = "Max" if param.pool == PoolingParameter.MAX else "Average"
    shape = (data.shape[0], data.shape[1], *window.outputs)
    if len(ctx.tops) == 2:
        return _with_mask(ctx, window, shape)
    if window.is_global:
        return [ctx.emit(f"Global{op}Pool", [data], shape)]
    attributes = window.attributes()
    if op == "Max" or not any(window.pad):
        return [ctx.emit(f"{op}Pool", [data], shape, **attributes)]
    shares = window.shares()
    if shares is None:
        return [ctx.emit("AveragePool", [data], shape, count_include_pad=1, **attributes)]
    # If a window ends beyond the padded image, Caffe counts the padding but nothing beyond it. Some engines can only
    # count both or neither, but all agree on the mean over pixels alone. So multiply that mean by each window's share
    # of pixels.
    pixels = ctx.emit("AveragePool", [data], shape, **attributes)
    return [ctx.emit("Mul", [pixels, ctx.constant(shares[None, None], "shares")], shape)]


def _with_mask(ctx: LayerContext, window: _Window, shape: tuple[Dim, ...]) -> list[Value]:
    """Convert MAX pooling with a mask as second top.

    ONNX's indices count through the whole batch, and MaxUnpool needs them in that form. Other readers of the mask get
    Caffe's indices, which count within one plane.
    """
    data = ctx.bottoms[0]
    if ctx.param.pooling_param.pool != PoolingParameter.MAX:
        ctx.fail("a mask as second top needs MAX pooling")
    pooled, indices = ctx.emit_many("MaxPool", [data], [(shape, np.float32), (shape, np.int64)], **window.attributes())
    plane = known(data.shape[2], "the height under a mask") * known(data.shape[3], "the width under a mask")
    pool = ctx.graph.nodes[-1]
    within = ctx.emit("Mod", [indices, ctx.constant(plane, "plane")], shape, np.int64)
    mask = ctx.emit("Cast", [within], shape, to=1)
    ctx.graph.masks[mask.name] = pool, indices.name
    return [pooled, mask]


class _Window:
    """Kernel, stride, pad and output size of a Pooling layer, each (height, width)."""

    def __init__(self, ctx: LayerContext, param: PoolingParameter, data: Value) -> None:
        self._ctx = ctx
        self.ceil = param.round_mode == PoolingParameter.CEIL and param.ceil_mode
        self.stride = self._pair(param.stride, (param.stride_h, param.stride_w), param.HasField("stride_h"))
        self.pad = self._pair(param.pad, (param.pad_h, param.pad_w), param.HasField("pad_h") or param.HasField("pad_w"))
        size = data.shape[2:]
        if param.global_pooling:
            self._global(param)
        else:
            explicit = param.HasField("kernel_h") and param.HasField("kernel_w")
            if explicit == param.HasField("kernel_size"):
                ctx.fail("needs either kernel_size or both kernel_h and kernel_w")
            self.kernel = self._pair(param.kernel_size, (param.kernel_h, param.kernel_w), explicit)
            self._check()
            self.outputs: tuple[Dim, ...] = tuple(self._pooled(i, dim) for i, dim in enumerate(size))
            self.is_global = not any(self.pad) and tuple(self.kernel) == size

    def _global(self, param: PoolingParameter) -> None:
        if param.HasField("kernel_size") or param.HasField("kernel_h") or param.HasField("kernel_w"):
            self._ctx.fail("global pooling allows no kernel size")
        if any(self.pad) or self.stride != [1, 1]:
            self._ctx.fail("global pooling allows no pad and no stride")
        if len(self._ctx.tops) == 2:
            self._ctx.fail("global pooling with a mask is not supported")
        self.kernel = [0, 0]
        self.outputs = (1, 1)
        self.is_global = True

    def _pair(self, both: int, each: tuple[int, int], explicit: bool) -> list[int]:
        return list(each) if explicit else [both, both]

    def _check(self) -> None:
        if min(self.kernel) < 1 or max(self.kernel) >= 2**31:
            self._ctx.fail(f"the kernel is {self.kernel}")
        if min(self.stride) < 1 or max(self.stride) >= 2**31:
            self._ctx.fail(f"the stride is {self.stride}")
        if any(pad >= size for pad, size in zip(self.pad, self.kernel, strict=True)):
            self._ctx.fail(f"the pad {self.pad} must be smaller than the kernel {self.kernel}")

    def _pooled(self, axis: int, size: Dim) -> Dim:
        kernel, stride, pad = self.kernel[axis], self.stride[axis], self.pad[axis]
        if isinstance(size, Symbol):
            if not any(self.pad) and kernel < stride:
                self._ctx.fail(f"the kernel {kernel} is smaller than the stride {stride}, which needs a known size")
            return Symbol(f"pool({size},{kernel},{pad},{stride},{int(self.ceil)})")
        span = size + 2 * pad - kernel
        if self.ceil and -stride < span < 0:
            # Rounding up gives one window, which Caffe clips to the padded input.
            self.kernel[axis] = size + 2 * pad
            return 1
        if span < 0:
            self._ctx.fail(f"the kernel {kernel} is larger than the padded input, {size + 2 * pad}")
        outputs = (-(-span // stride) if self.ceil else span // stride) + 1
        if (outputs - 1) * stride >= size + pad:
            if not any(self.pad):
                self._ctx.fail(
                    f"its last window starts at {(outputs - 1) * stride}, beyond the input size {size}, so Caffe's "
                    "result is undefined"
                )
            outputs -= 1
        return outputs

    def attributes(self) -> dict[str, Any]:
        attributes: dict[str, Any] = {"kernel_shape": self.kernel, "strides": self.stride}
        if any(self.pad):
            attributes["pads"] = self.pad * 2
        if self._needs_ceil():
            attributes["ceil_mode"] = 1
        return attributes

    def shares(self) -> NDArray[np.float32] | None:
        """Return each window's share of pixels, the rest being padding, as float32 (rows, columns).

        Return None if no window ends beyond the padding, or the size is unknown or above `_MAX_SHARES`.
        """
        lines = []
        exceeds = False
        for axis, (size, outputs) in enumerate(zip(self._ctx.bottoms[0].shape[2:], self.outputs, strict=True)):
            if isinstance(size, Symbol) or isinstance(outputs, Symbol) or outputs > _MAX_SHARES:
                return None
            start = np.arange(outputs) * self.stride[axis] - self.pad[axis]
            stop = start + self.kernel[axis]
            exceeds |= bool(np.any(stop > size + self.pad[axis]))
            counted = np.minimum(stop, size + self.pad[axis]) - start
            lines.append((np.minimum(stop, size) - np.maximum(start, 0)) / counted)
        if not exceeds:
            return None
        self._ctx.graph.check_budget(lines[0].size * lines[1].size * FLOAT.itemsize)
        # `out` and `casting` make NumPy multiply in float64 without a float64 copy of the result.
        made = np.empty((lines[0].size, lines[1].size), FLOAT)
        return np.multiply(lines[0][:, None], lines[1], out=made, dtype=np.float64, casting="unsafe")

    def _needs_ceil(self) -> bool:
        """Return whether rounding up changes the output size; runtimes optimize nodes without ceil_mode better."""
        if not self.ceil:
            return False
        for axis, size in enumerate(self._ctx.bottoms[0].shape[2:]):
            if isinstance(size, Symbol) or (size + 2 * self.pad[axis] - self.kernel[axis]) % self.stride[axis]:
                return True
        return False
