"""Convolution, its depthwise variants, and Deconvolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..caffe_pb2 import ConvolutionParameter
from ..graph import Value
from ..shapes import Dim, Symbol, known
from .converters import LayerContext, converts

# A filler creates weights from the prototxt alone, so a small file could ask for any amount of memory.
_MAX_FILLED = 2**24


@converts("Convolution")
def convolution(ctx: LayerContext) -> list[Value]:
    """Caffe's Convolution, (N, C, spatial...) -> (N, num_output, spatial...), with any number of spatial axes."""
    return _convolve(ctx, ctx.param.convolution_param.group)


@converts("DepthwiseConvolution", "ConvolutionDepthwise", "DepthwiseConv")
def depthwise(ctx: LayerContext) -> list[Value]:
    """The depthwise layers of forks: a Convolution with one group per channel. `group` is ignored."""
    data = ctx.bottom()
    if len(data.shape) < 2:
        ctx.fail("its bottom has no channel axis")
    return _convolve(ctx, known(data.shape[1], "the number of channels"))


@converts("Deconvolution")
def deconvolution(ctx: LayerContext) -> list[Value]:
    """Caffe's Deconvolution, (N, C, spatial...) -> (N, num_output, spatial...).

    A spatial size H becomes s(H-1) + d(k-1) + 1 - 2p. Without weights in the caffemodel, the weights are those of
    Caffe's bilinear filler.
    """
    data = ctx.bottom()
    param = ctx.param.convolution_param
    window = _Window(ctx, param, data)
    channels, outputs = _channels(ctx, data, param.num_output, param.group)
    sizes = tuple(window.deconvolved(i, size) for i, size in enumerate(data.shape[2:]))
    shape = (channels, outputs // param.group, *window.kernel)
    weight = _bilinear(ctx, shape) if ctx.blob_count() == 0 else ctx.blob(0, shape)
    return [_emit(ctx, "ConvTranspose", window, weight, param.group, (data.shape[0], outputs, *sizes))]


def _convolve(ctx: LayerContext, group: int) -> list[Value]:
    data = ctx.bottom()
    param = ctx.param.convolution_param
    window = _Window(ctx, param, data)
    channels, outputs = _channels(ctx, data, param.num_output, group)
    sizes = tuple(window.convolved(i, size) for i, size in enumerate(data.shape[2:]))
    weight = ctx.blob(0, (outputs, channels // group, *window.kernel))
    return [_emit(ctx, "Conv", window, weight, group, (data.shape[0], outputs, *sizes))]


def _emit(
    ctx: LayerContext,
    op: str,
    window: _Window,
    weight: NDArray[np.float32],
    group: int,
    shape: tuple[Dim, ...],
) -> Value:
    inputs = [ctx.bottoms[0], ctx.constant(weight, "weight")]
    if ctx.param.convolution_param.bias_term:
        outputs = known(shape[1], "the number of outputs")
        inputs.append(ctx.constant(ctx.blob(1, (outputs,)), "bias"))
    attributes: dict[str, Any] = {"kernel_shape": window.kernel, "strides": window.stride}
    if any(window.pad):
        attributes["pads"] = window.pad * 2
    if any(size != 1 for size in window.dilation):
        attributes["dilations"] = window.dilation
    if group != 1:
        attributes["group"] = group
    return ctx.emit(op, inputs, shape, **attributes)


def _channels(ctx: LayerContext, data: Value, outputs: int, group: int) -> tuple[int, int]:
    channels = known(data.shape[1], "the number of channels")
    if not 1 <= outputs < 2**31:
        ctx.fail(f"num_output is {outputs}")
    if group < 1 or channels % group or outputs % group:
        ctx.fail(f"{channels} channels and {outputs} outputs cannot be split into {group} groups")
    return channels, outputs


class _Window:
    """Kernel, pad, stride and dilation, with one number per spatial axis.

    Source: BVLC Caffe, base_conv_layer.cpp.
    """

    def __init__(self, ctx: LayerContext, param: ConvolutionParameter, data: Value) -> None:
        if len(data.shape) < 3:
            ctx.fail(f"its bottom has {len(data.shape)} axes, so none is spatial")
        if ctx.axis(param.axis, data) != 1:
            ctx.fail(f"axis is {param.axis}; only channels on axis 1 are supported")
        self._ctx = ctx
        self._spatial = len(data.shape) - 2
        self.kernel = self._pair("kernel", param.kernel_size, param, ("kernel_h", "kernel_w"), None)
        self.stride = self._pair("stride", param.stride, param, ("stride_h", "stride_w"), 1)
        self.pad = self._pair("pad", param.pad, param, ("pad_h", "pad_w"), 0)
        self.dilation = self._pair("dilation", param.dilation, param, None, 1)

    def _pair(
        self,
        what: str,
        repeated: Sequence[int],
        param: ConvolutionParameter,
        fields: tuple[str, str] | None,
        default: int | None,
    ) -> list[int]:
        if fields and (param.HasField(fields[0]) or param.HasField(fields[1])):  # type: ignore[arg-type]
            if self._spatial != 2:
                self._ctx.fail(f"{fields[0]} and {fields[1]} need two spatial axes, not {self._spatial}")
            sizes = [getattr(param, name) for name in fields]
        elif len(repeated) in (1, self._spatial):
            sizes = list(repeated) * (self._spatial // len(repeated))
        elif not repeated and default is not None:
            sizes = [default] * self._spatial
        else:
            self._ctx.fail(f"has {len(repeated)} {what} sizes for {self._spatial} spatial axes")
        if min(sizes) < (0 if what == "pad" else 1) or max(sizes) >= 2**31:
            self._ctx.fail(f"{what} is {sizes}")
        return sizes

    def _extent(self, axis: int) -> int:
        return self.dilation[axis] * (self.kernel[axis] - 1) + 1

    def convolved(self, axis: int, size: Dim) -> Dim:
        extent, pad, stride = self._extent(axis), self.pad[axis], self.stride[axis]
        if isinstance(size, Symbol):
            return size if (stride, extent) == (1, 2 * pad + 1) else Symbol(f"conv({size},{extent},{pad},{stride})")
        if size + 2 * pad < extent:
            self._ctx.fail(f"the kernel's extent {extent} is larger than the padded input, {size + 2 * pad}")
        return (size + 2 * pad - extent) // stride + 1

    def deconvolved(self, axis: int, size: Dim) -> Dim:
        extent, pad, stride = self._extent(axis), self.pad[axis], self.stride[axis]
        if isinstance(size, Symbol):
            return Symbol(f"deconv({size},{extent},{pad},{stride})")
        result = stride * (size - 1) + extent - 2 * pad
        if result < 1:
            self._ctx.fail(f"the pad {pad} removes all {stride * (size - 1) + extent} positions")
        return result


def _bilinear(ctx: LayerContext, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the weights of Caffe's BilinearFiller, which are the same for every channel.

    Source: BVLC Caffe, filler.hpp.
    """
    filler = ctx.param.convolution_param.weight_filler.type
    if filler != "bilinear" or ctx.param.convolution_param.bias_term:
        ctx.fail("has no weights in the caffemodel")
    if len(shape) != 4 or shape[2] != shape[3]:
        ctx.fail(f"the bilinear filler needs a square kernel, not {list(shape[2:])}")
    count = int(np.prod([float(size) for size in shape]))
    if count > _MAX_FILLED:
        ctx.fail(f"the bilinear filler would make {count} weights")
    ctx.graph.check_budget(4 * count)
    size = shape[3]
    factor = (size + 1) // 2
    centre = (2 * factor - 1 - factor % 2) / (2.0 * factor)
    line = 1 - np.abs(np.arange(size) / factor - centre)
    return np.broadcast_to(np.outer(line, line), shape).astype(np.float32)
