"""`feature`: the numbers of one layer, as a stream of little-endian float32 in C order.

Params: ``layer``, one of ``custom_values.layers`` or of the net's outputs (the net's only output, or that which
``custom_values.output`` names).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from atserving.errors import InvalidArgument
from evaluator.net_contract import Config, Model, Req, Ret
from evaluator.nets import image_input
from evaluator.options import Options
from evaluator.runtime.engine import Array
from evaluator.runtime.net import Net


@image_input.net_init
def net_init(cfg: Config) -> Model:
    """``error`` says why the release can't be served for its features."""
    values = Options("custom_values", cfg["custom_values"])
    layers = values.texts("layers")
    model = image_input.load(cfg, layers)
    net: Net = model["net"]
    # What was asked for beside the net's own outputs comes after them.
    own = [name for name in net.outputs if name not in layers] or net.outputs
    default = values.text("output", own[0])
    if default not in net.outputs or (len(own) > 1 and "output" not in cfg["custom_values"]):
        default = image_input.output(net, cfg, "features")
    return {**model, "output": default}


def net_preprocess(model: Model, req: Req) -> Req:
    """``{"input": (height, width, channels) uint8, "layer": name of an output}``. Raises InvalidArgument."""
    layer = image_input.params(req).get("layer", model["output"])
    if layer not in model["net"].outputs:
        raise InvalidArgument(f"params.layer should be one of: {', '.join(model['net'].outputs)}")
    pixels, _ = image_input.image(model, req, "feature")
    return {"input": pixels, "layer": layer}


def net_inference(model: Model, args: dict[str, Any]) -> list[Ret]:
    """One forward pass over all requests, for the layers that they ask for."""
    net: Net = model["net"]
    reqs = args["reqs"]
    layers = sorted({req["layer"] for req in reqs})
    results = net.run({net.inputs[0]: np.stack([req["input"] for req in reqs])}, layers)
    return [_ret(results[req["layer"]], place, len(reqs)) for place, req in enumerate(reqs)]


def _ret(numbers: Array, place: int, count: int) -> Ret:
    if numbers.shape[0] != count:
        return {"code": 500, "message": "the layer does not give numbers for each image"}
    if not np.isfinite(numbers[place]).all():
        return {"code": 500, "message": "the net's output is not finite"}
    return {"code": 0, "message": "", "result_file": numbers[place].astype("<f4").tobytes()}
