"""How alike two digits are: the cosine of what the network `digits` makes of each before it decides.

A request is a group of two images. The answer is `{"similarity": <-1 to 1>}`, or, with `params.format` "stream", both
embeddings as little-endian float32, the first image's before the second's.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluator import scripting

GROUP = 2
FORMATS = ("json", "stream")


def net_init(cfg: dict[str, Any]) -> dict[str, Any]:
    net = scripting.net(cfg)
    name = net.inputs[0]
    return {
        "error": "",
        "net": net,
        "transformer": scripting.transformer(cfg, net.blobs[name].shape),
        "batch_size": cfg["batch_size"] or 8,
        "input": name,
        "output": net.outputs[0],
    }


def net_preprocess(model: dict[str, Any], req: dict[str, Any]) -> dict[str, Any]:
    """`{"images": (2, channels, height, width), "format"}`, or the ret of a request that is none of ours."""
    group, params = req["data"], req.get("params")
    params = {} if params is None else params
    if not isinstance(group, list) or len(group) != GROUP:
        return _refused("data should be a list of two images")
    if not isinstance(params, dict) or params.get("format", "json") not in FORMATS:
        return _refused('params.format should be "json" or "stream"')
    images = [model["transformer"](scripting.read_image(each["body"])) for each in group]
    return {"images": np.stack(images), "format": params.get("format", "json")}


def net_inference(model: dict[str, Any], args: dict[str, Any]) -> list[dict[str, Any]]:
    """One forward pass over the images of all requests."""
    reqs = args["reqs"]
    groups = [req["images"] for req in reqs if "images" in req]
    if not groups:
        return [req["ret"] for req in reqs]
    embeddings = model["net"].forward({model["input"]: np.concatenate(groups)})[model["output"]]
    pairs = iter(embeddings.reshape(len(groups), GROUP, -1))
    return [_answer(next(pairs), req["format"]) if "images" in req else req["ret"] for req in reqs]


def _answer(pair: NDArray[np.float32], wanted: str) -> dict[str, Any]:
    if wanted == "stream":
        return {"code": 0, "message": "", "result_file": pair.astype("<f4").tobytes()}
    first, second = pair.astype(np.float64)
    lengths = np.linalg.norm(first) * np.linalg.norm(second)
    similarity = float(first @ second / lengths) if lengths else 0.0
    return {"code": 0, "message": "", "result": {"similarity": similarity}}


def _refused(message: str) -> dict[str, Any]:
    return {"ret": {"code": 400, "message": message}}
