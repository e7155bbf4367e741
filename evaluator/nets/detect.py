"""`detect`: the things on an image and where they are, the surest first.

For nets that end in a DetectionOutput, and those that ``custom_values.head`` describes (:mod:`evaluator.nets.heads`).
Params: ``threshold``, the least score, 0 to 1 (``custom_values.threshold``, 0.5). Result: ``{"detections": [{"pts",
"index", "class", "score"}, ...]}``; ``pts`` are the corners [x, y] clockwise from top left, in pixels of the upright
image and inside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atserving.errors import InvalidArgument, StartError
from evaluator.net_contract import Config, Model, Req, Ret
from evaluator.nets import heads, image_input
from evaluator.options import Options
from evaluator.runtime.engine import Array
from evaluator.runtime.net import Net

_THRESHOLD = 0.5
# Of a row: the image's place in the batch, the label, the score, and the corners as shares of the input's size.
_ROW = 7


@dataclass(frozen=True)
class DetectionOutput:
    """Reads that layer's rows, as :class:`heads.Head` reads grids."""

    name: str

    def rows(self, outputs: Mapping[str, Array], place: int, threshold: float) -> NDArray[Any]:
        """As (n, 6): the label, the score, and left, top, right and bottom as shares of the net's input."""
        rows = outputs[self.name].reshape(-1, _ROW)
        rows = rows[rows[:, 0] == place, 1:]
        # What is no number is kept, to be seen.
        return rows[~(rows[:, 1] < threshold)]


@image_input.net_init
def net_init(cfg: Config) -> Model:
    """``error`` says why the release can't be served as a detector."""
    values = Options("custom_values", cfg["custom_values"])
    threshold = values.share("threshold", _THRESHOLD)
    model = image_input.load(cfg)
    net: Net = model["net"]
    if "head" in cfg["custom_values"]:
        return {**model, "head": heads.read(values.object("head"), net, model["input_size"]), "threshold": threshold}
    output = image_input.output(net, cfg, "detections")
    if net.output_shape(output)[-1:] != (_ROW,):
        raise StartError(
            f"detect takes nets that end in a DetectionOutput; {output!r} is no such output, "
            "and there is no custom_values.head"
        )
    return {**model, "head": DetectionOutput(output), "threshold": threshold}


def net_preprocess(model: Model, req: Req) -> Req:
    """``{"input": (height, width, channels) uint8, "size": (width, height) of the image, "threshold"}``."""
    threshold = image_input.params(req).get("threshold", model["threshold"])
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise InvalidArgument("params.threshold should be a number from 0 to 1")
    pixels, size = image_input.image(model, req, "detect")
    return {"input": pixels, "size": size, "threshold": threshold}


def net_inference(model: Model, args: dict[str, Any]) -> list[Ret]:
    """One forward pass over all requests."""
    net: Net = model["net"]
    reqs = args["reqs"]
    outputs = net.run({net.inputs[0]: np.stack([req["input"] for req in reqs])})
    return [_ret(model, model["head"].rows(outputs, place, req["threshold"]), req) for place, req in enumerate(reqs)]


def _ret(model: Model, rows: NDArray[Any], req: Req) -> Ret:
    if not np.isfinite(rows).all():
        return {"code": 500, "message": "the net's output is not finite"}
    rows = rows[np.argsort(-rows[:, 1], kind="stable")]
    corners, inside = _corners(rows[:, 2:], model["transformer"].window, req["size"])
    return {
        "code": 0,
        "message": "",
        "result": {
            "detections": [
                _detection(model, int(row[0]), float(row[1]), pts)
                for row, pts, is_inside in zip(rows, corners.tolist(), inside, strict=True)
                if is_inside
            ]
        },
    }


def _detection(model: Model, index: int, score: float, corners: list[int]) -> dict[str, Any]:
    left, top, right, bottom = corners
    return {
        "pts": [[left, top], [right, top], [right, bottom], [left, bottom]],
        "index": index,
        "class": image_input.class_name(model, index),
        "score": score,
    }


def _corners(
    boxes: NDArray[Any], window: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.bool_]]]:
    """Boxes (n, 4), shares of the net's input → pixels of the image, cut to it; and which have any part in it.

    ``window`` is the part of the image that the net has seen, left, top, right and bottom as shares of its size.
    """
    origin, extent = np.tile(window[:2], 2), np.tile(np.subtract(window[2:], window[:2]), 2)
    cut = np.clip(origin + boxes.astype(np.float64) * extent, 0, 1)
    inside = (cut[:, 0] < cut[:, 2]) & (cut[:, 1] < cut[:, 3])
    last = np.tile(np.array(size) - 1, 2)
    return np.minimum(np.rint(cut * np.tile(size, 2)), last).astype(np.int64), inside
