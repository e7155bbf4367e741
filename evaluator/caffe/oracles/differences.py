"""Known differences between an oracle and the model.

The differences of OpenCV 4 from Caffe were found by running the test fixtures in both.
"""

from __future__ import annotations

from collections.abc import Callable

from ..caffe_pb2 import LayerParameter, LRNParameter
from ..net_plan import NetLayer, NetPlan


def opencv_difference(plan: NetPlan) -> str:
    """Return why OpenCV's outputs would differ from Caffe's, with the layer's name; "" if no difference is known."""
    for layer in plan.layers:
        check = _DIFFERENCES.get(layer.spec.type)
        difference = check(layer, layer.spec.param) if check else ""
        if difference:
            return f"cannot judge this net: layer {layer.spec.name!r}: {difference}"
    return ""


def caffe_difference(plan: NetPlan) -> str:
    """Return why the model's outputs differ from Caffe's on purpose, with the layer's name; "" if they do not."""
    for layer in plan.layers:
        if layer.spec.type == "SoftmaxWithLoss" and len(layer.spec.tops) < 2:
            return (
                f"cannot judge this net: layer {layer.spec.name!r}: "
                "it returns the loss, but the model returns the softmax"
            )
    return ""


def _lrn(layer: NetLayer, param: LayerParameter) -> str:
    lrn = param.lrn_param
    across = lrn.norm_region == LRNParameter.ACROSS_CHANNELS
    return "it ignores k of LRN" if across and lrn.k != 1 else ""


def _deconvolution(layer: NetLayer, param: LayerParameter) -> str:
    conv = param.convolution_param
    if any(dilation != 1 for dilation in conv.dilation):
        return "it ignores dilation of Deconvolution"
    if conv.group > 1 and conv.group != conv.num_output:
        return "it differs from Caffe in Deconvolution with groups"
    return ""


def _scale(layer: NetLayer, param: LayerParameter) -> str:
    biased = len(layer.bottoms) > 1 and param.scale_param.bias_term
    return "it ignores the bias of Scale with two bottoms" if biased else ""


def _prior_box(layer: NetLayer, param: LayerParameter) -> str:
    prior = param.prior_box_param
    if not prior.HasField("clip"):
        return "it clips the priors of PriorBox unless clip is given"
    if prior.img_size or prior.img_h or prior.img_w:
        return "it ignores img_size, img_h and img_w of PriorBox"
    return ""


_DIFFERENCES: dict[str, Callable[[NetLayer, LayerParameter], str]] = {
    "LRN": _lrn,
    "Deconvolution": _deconvolution,
    "Scale": _scale,
    "Log": lambda layer, param: "it differs from Caffe in Log",
    "MVN": lambda layer, param: (
        "it adds the eps of MVN inside the square root"
        if param.mvn_param.normalize_variance and param.mvn_param.eps > 1e-6
        else ""
    ),
    "InnerProduct": lambda layer, param: (
        "it ignores transpose of InnerProduct" if param.inner_product_param.transpose else ""
    ),
    "Swish": lambda layer, param: "it ignores beta of Swish" if param.swish_param.beta != 1 else "",
    "PriorBox": _prior_box,
}
