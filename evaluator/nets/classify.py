"""`classify`: the classes of an image, the likeliest first.

Params: ``limit``, how many (1); all classes where it is larger. Result: ``{"confidences": [{"index", "class", "score"},
...]}``, best first; ``class`` is the index as text where ``labels.csv`` does not name it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from atserving.errors import InvalidArgument, StartError
from evaluator import images, labels, preprocess
from evaluator.contract import Config, Model, Req, Ret
from evaluator.net import Net
from evaluator.values import Values

_BATCH_SIZE_GPU = 32
_BATCH_SIZE_CPU = 8


def net_init(cfg: Config) -> Model:
    """``error`` says why the release can't be served as a classifier."""
    try:
        return _init(cfg)
    except StartError as error:
        return {"error": str(error)}


def _init(cfg: Config) -> Model:
    net = Net.load(cfg)
    if len(net.inputs) != 1 or len(net.input_shape(net.inputs[0])) != 3 or None in net.input_shape(net.inputs[0]):
        raise StartError(f"classify takes nets with one image input of a fixed size; this one has {net.inputs}")
    values = Values("custom_values", cfg["custom_values"])
    output = values.text("output", net.outputs[0])
    if output not in net.outputs or (len(net.outputs) > 1 and "output" not in cfg["custom_values"]):
        raise StartError(f"the net's outputs are {net.outputs}; custom_values.output should name the one of classes")
    channels, height, width = (int(size or 0) for size in net.input_shape(net.inputs[0]))
    return {
        "error": "",
        "net": net,
        "batch_size": cfg["batch_size"] or (_BATCH_SIZE_CPU if cfg["use_device"] == "CPU" else _BATCH_SIZE_GPU),
        "transformer": preprocess.transformer(cfg, (channels, height, width)),
        "limits": images.Limits.of_release(cfg["custom_values"]),
        "synset_list": labels.read(cfg["tar_files"].get("labels.csv")),
        "output": output,
    }


def net_preprocess(model: Model, req: Req) -> Req:
    """``{"input": (channels, height, width) float32, "limit": int}``. Raises InvalidArgument."""
    data = req["data"]
    if isinstance(data, list):
        raise InvalidArgument("classify takes one image, not a list of them")
    limit = _limit(req.get("params"))
    return {"input": model["transformer"](images.decode(data["body"], model["limits"])), "limit": limit}


def net_inference(model: Model, args: dict[str, Any]) -> list[Ret]:
    """One forward pass over all requests."""
    net: Net = model["net"]
    reqs = args["reqs"]
    scores = net.run({net.inputs[0]: np.stack([req["input"] for req in reqs])})[model["output"]]
    # (n, k), or (n, k, 1, 1) after a global pooling.
    if scores.shape[0] != len(reqs) or scores.size != len(reqs) * scores.shape[1]:
        return [{"code": 500, "message": f"the net's output is {scores.shape}, not one score a class"}] * len(reqs)
    rows = scores.reshape(len(reqs), -1)
    return [_ret(row, req["limit"], model["synset_list"]) for row, req in zip(rows, reqs, strict=True)]


def _ret(scores: np.ndarray[Any, np.dtype[np.float32]], limit: int, names: dict[int, str]) -> Ret:
    if not np.isfinite(scores).all():
        return {"code": 500, "message": "the net's output is not finite"}
    # Stable, so that equal scores come in the order of their index.
    best = np.argsort(-scores, kind="stable")[:limit].tolist()
    confidences = [
        {"index": index, "class": names.get(index, str(index)), "score": float(scores[index])} for index in best
    ]
    return {"code": 0, "message": "", "result": {"confidences": confidences}}


def _limit(params: object) -> int:
    if params is None:
        return 1
    if not isinstance(params, dict):
        raise InvalidArgument("params should be an object")
    limit = params.get("limit", 1)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise InvalidArgument("params.limit should be a positive integer")
    return limit
