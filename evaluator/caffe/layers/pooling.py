"""Pooling."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..caffe_pb2 import PoolingParameter
from ..graph import FLOAT, Value
from ..shapes import Dim, Symbol, known
from .converters import LayerContext, converts

# The shares of an image's windows are a constant; an image of such a size is none.
_MAX_SHARES = 2**12


@converts("Pooling")
def pooling(ctx: LayerContext) -> list[Value]:
    """Caffe's Pooling (N, C, H, W): MAX, also with its mask as second top, or AVE.

    The output has ceil((H + 2p - k) / s) + 1 rows, and one less where the last would start beyond the image and its
    leading padding; ONNX's ceil_mode says the same from opset 22 on. AVE divides by the window with its padding but
    without what lies beyond the padded image.
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
    # Where a window ends beyond the padding, Caffe counts the padding and not what is beyond it; engines that can only
    # count all or nothing of that need not. The mean of the pixels alone is the same everywhere, and the window's share
    # of pixels is known.
    pixels = ctx.emit("AveragePool", [data], shape, **attributes)
    return [ctx.emit("Mul", [pixels, ctx.constant(shares[None, None], "shares")], shape)]


def _with_mask(ctx: LayerContext, window: _Window, shape: tuple[Dim, ...]) -> list[Value]:
    """MAX with a second top: ONNX's indices, which count through the whole batch.

    MaxUnpool takes them as they are. For any other reader they become Caffe's mask, the position within the plane.
    """
    data = ctx.bottoms[0]
    if ctx.param.pooling_param.pool != PoolingParameter.MAX:
        ctx.fail("only MAX pooling has a mask for a second top")
    pooled, indices = ctx.emit_many("MaxPool", [data], [(shape, np.float32), (shape, np.int64)], **window.attributes())
    plane = known(data.shape[2], "the height under a mask") * known(data.shape[3], "the width under a mask")
    pool = ctx.graph.nodes[-1]
    within = ctx.emit("Mod", [indices, ctx.constant(plane, "plane")], shape, np.int64)
    mask = ctx.emit("Cast", [within], shape, to=1)
    ctx.graph.masks[mask.name] = pool, indices.name
    return [pooled, mask]


class _Window:
    """Kernel, stride, pad and result of a Pooling layer, (h, w) each."""

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
            self._ctx.fail("global pooling takes no kernel size")
        if any(self.pad) or self.stride != [1, 1]:
            self._ctx.fail("global pooling takes no pad and no stride")
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
            self._ctx.fail(f"the pad {self.pad} is not smaller than the kernel {self.kernel}")

    def _pooled(self, axis: int, size: Dim) -> Dim:
        kernel, stride, pad = self.kernel[axis], self.stride[axis], self.pad[axis]
        if isinstance(size, Symbol):
            if not any(self.pad) and kernel < stride:
                self._ctx.fail(f"a kernel of {kernel} with a stride of {stride} needs a known size")
            return Symbol(f"pool({size},{kernel},{pad},{stride},{int(self.ceil)})")
        room = size + 2 * pad - kernel
        if self.ceil and -stride < room < 0:
            # Rounding up leaves one window, which Caffe ends where the padded input does.
            self.kernel[axis] = size + 2 * pad
            return 1
        if room < 0:
            self._ctx.fail(f"the kernel {kernel} is larger than the padded input, {size + 2 * pad}")
        outputs = (-(-room // stride) if self.ceil else room // stride) + 1
        if (outputs - 1) * stride >= size + pad:
            if not any(self.pad):
                self._ctx.fail(
                    f"its last window would start at {(outputs - 1) * stride}, beyond the input of {size}: Caffe's "
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
        """Which share of each window is pixels, the rest being padding; None where no window ends beyond that."""
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
        self._ctx.graph.afford(lines[0].size * lines[1].size * FLOAT.itemsize)
        # In float64, but with no float64 copy of the whole.
        made = np.empty((lines[0].size, lines[1].size), FLOAT)
        return np.multiply(lines[0][:, None], lines[1], out=made, dtype=np.float64, casting="unsafe")

    def _needs_ceil(self) -> bool:
        """Whether rounding up makes a difference; without it other passes and runtimes know the node better."""
        if not self.ceil:
            return False
        for axis, size in enumerate(self._ctx.bottoms[0].shape[2:]):
            if isinstance(size, Symbol) or (size + 2 * self.pad[axis] - self.kernel[axis]) % self.stride[axis]:
                return True
        return False
