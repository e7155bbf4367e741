"""``feature``: the values of one layer, as a stream of little-endian float32 in C order.

Params: ``layer``, one of ``custom_values.layers`` or of the net's outputs. The default is the net's only output, or the
one that ``custom_values.output`` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atserving.errors import InvalidArgument
from evaluator.images.decoding import Pixels
from evaluator.net_config import NetConfig
from evaluator.net_contract import Req, Ret
from evaluator.nets import image_input
from evaluator.nets.image_input import ImageNet
from evaluator.runtime.engine import Array


@dataclass(frozen=True)
class Input:
    """A prepared request. ``pixels`` is (height, width, channels) uint8, ``layer`` the name of an output."""

    pixels: Pixels
    layer: str


class Feature(ImageNet):
    """A net that is served for the values of its layers."""

    name = "feature"

    def __init__(self, config: NetConfig) -> None:
        """Raises StartError if the release can't be served for its features."""
        layers = config.custom_values.texts("layers")
        super().__init__(config, layers)
        outputs = self.net.outputs
        # The outputs of the net itself come before the layers.
        own = [name for name in outputs if name not in layers] or outputs
        default = config.custom_values.text("output", own[0])
        if default not in outputs or (len(own) > 1 and "output" not in config.custom_values):
            default = self.output("features")
        self._default = default

    def preprocess(self, req: Req) -> Input:
        layer = image_input.params(req).get("layer", self._default)
        if layer not in self.net.outputs:
            raise InvalidArgument(f"params.layer should be one of: {', '.join(self.net.outputs)}")
        pixels, _ = self.image(req)
        return Input(pixels, layer)

    def infer(self, reqid: str, reqs: Sequence[Input]) -> list[Ret]:
        """Run one forward pass over all requests, for the layers that they ask for."""
        layers = sorted({req.layer for req in reqs})
        results = self.net.run({self.net.inputs[0]: np.stack([req.pixels for req in reqs])}, layers)
        return [_ret(results[req.layer], index, len(reqs)) for index, req in enumerate(reqs)]


def _ret(values: Array, index: int, count: int) -> Ret:
    if values.shape[0] != count:
        return {"code": 500, "message": "the layer does not give numbers for each image"}
    if not np.isfinite(values[index]).all():
        return {"code": 500, "message": "the net's output is not finite"}
    return {"code": 0, "message": "", "result_file": values[index].astype("<f4").tobytes()}
