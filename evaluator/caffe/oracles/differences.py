"""Where an oracle gives other numbers than the model is to: OpenCV 4 others than Caffe, found by running the fixtures
with both, and Caffe a loss."""

from __future__ import annotations

from collections.abc import Callable

from ..caffe_pb2 import LayerParameter, LRNParameter
from ..net_plan import NetLayer, NetPlan


def unfit(plan: NetPlan) -> str:
    """Why OpenCV's answer would not be Caffe's, naming the layer; "" where nothing is known against it."""
    for layer in plan.layers:
        check = _DIFFERENCES.get(layer.spec.type)
        difference = check(layer, layer.spec.param) if check else ""
        if difference:
            return f"is no oracle for this net: layer {layer.spec.name!r}: {difference}"
    return ""


def unfit_caffe(plan: NetPlan) -> str:
    """Why Caffe's answer would not be what is served; "" where it is."""
    for layer in plan.layers:
        if layer.spec.type == "SoftmaxWithLoss" and len(layer.spec.tops) < 2:
            return f"is no oracle for this net: layer {layer.spec.name!r}: it gives the loss, the model the softmax"
    return ""


def _lrn(layer: NetLayer, param: LayerParameter) -> str:
    lrn = param.lrn_param
    across = lrn.norm_region == LRNParameter.ACROSS_CHANNELS
    return "it takes k for 1 in LRN" if across and lrn.k != 1 else ""


def _deconvolution(layer: NetLayer, param: LayerParameter) -> str:
    conv = param.convolution_param
    if any(dilation != 1 for dilation in conv.dilation):
        return "it leaves dilation out of Deconvolution"
    if conv.group > 1 and conv.group != conv.num_output:
        return "it gives other numbers for a Deconvolution with groups"
    return ""


def _scale(layer: NetLayer, param: LayerParameter) -> str:
    biased = len(layer.bottoms) > 1 and param.scale_param.bias_term
    return "it leaves out the bias of a Scale with two bottoms" if biased else ""


def _prior_box(layer: NetLayer, param: LayerParameter) -> str:
    prior = param.prior_box_param
    if not prior.HasField("clip"):
        return "it clips the priors of a PriorBox that does not say"
    if prior.img_size or prior.img_h or prior.img_w:
        return "it leaves out img_size, img_h and img_w of PriorBox"
    return ""


_DIFFERENCES: dict[str, Callable[[NetLayer, LayerParameter], str]] = {
    "LRN": _lrn,
    "Deconvolution": _deconvolution,
    "Scale": _scale,
    "Log": lambda layer, param: "it gives other numbers for Log",
    "MVN": lambda layer, param: (
        "it takes the eps of MVN into the root"
        if param.mvn_param.normalize_variance and param.mvn_param.eps > 1e-6
        else ""
    ),
    "InnerProduct": lambda layer, param: (
        "it leaves out transpose of InnerProduct" if param.inner_product_param.transpose else ""
    ),
    "Swish": lambda layer, param: "it leaves out beta of Swish" if param.swish_param.beta != 1 else "",
    "PriorBox": _prior_box,
}
