"""`classify`: the classes of an image, the likeliest first.

Params: ``limit``, how many (1); all classes where it is larger. Result: ``{"confidences": [{"index", "class", "score"},
...]}``, best first; ``class`` is the index as text where ``labels.csv`` does not name it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from atserving.errors import InvalidArgument, StartError
from evaluator.net_contract import Config, Model, Req, Ret
from evaluator.nets import image_input
from evaluator.runtime.net import Net


@image_input.net_init
def net_init(cfg: Config) -> Model:
    """``error`` says why the release can't be served as a classifier."""
    model = image_input.load(cfg)
    net: Net = model["net"]
    output = image_input.output(net, cfg, "classes")
    shape = net.output_shape(output)
    # One score a class, with or without the axes of a global pooling.
    if not shape or any(size not in (1, None) for size in shape[1:]):
        raise StartError(f"classify takes nets that give one score a class; {output!r} is {shape}")
    return {**model, "output": output}


def net_preprocess(model: Model, req: Req) -> Req:
    """``{"input": (height, width, channels) uint8, "limit": int}``. Raises InvalidArgument."""
    limit = _limit(image_input.params(req))
    pixels, _ = image_input.image(model, req, "classify")
    return {"input": pixels, "limit": limit}


def net_inference(model: Model, args: dict[str, Any]) -> list[Ret]:
    """One forward pass over all requests."""
    net: Net = model["net"]
    reqs = args["reqs"]
    scores = net.run({net.inputs[0]: np.stack([req["input"] for req in reqs])})[model["output"]]
    # (n, k), or (n, k, 1, 1) after a global pooling.
    if scores.shape[0] != len(reqs) or scores.size != len(reqs) * scores.shape[1]:
        return [{"code": 500, "message": f"the net's output is {scores.shape}, not one score a class"}] * len(reqs)
    rows = scores.reshape(len(reqs), -1)
    return [_ret(model, row, req["limit"]) for row, req in zip(rows, reqs, strict=True)]


def _ret(model: Model, scores: np.ndarray[Any, np.dtype[np.float32]], limit: int) -> Ret:
    if not np.isfinite(scores).all():
        return {"code": 500, "message": "the net's output is not finite"}
    # Stable, so that equal scores come in the order of their index.
    best = [int(scores.argmax())] if limit == 1 else np.argsort(-scores, kind="stable")[:limit].tolist()
    confidences = [
        {"index": index, "class": image_input.class_name(model, index), "score": float(scores[index])} for index in best
    ]
    return {"code": 0, "message": "", "result": {"confidences": confidences}}


def _limit(params: dict[str, Any]) -> int:
    limit = params.get("limit", 1)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise InvalidArgument("params.limit should be a positive integer")
    return limit
