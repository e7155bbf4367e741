"""What the built-in nets have in common: one image in, read and prepared as the release says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from atserving.errors import InvalidArgument, StartError
from evaluator import images, labels, preprocess
from evaluator.contract import Config, Model, Req
from evaluator.net import Net
from evaluator.values import Values

_BATCH_SIZE_GPU = 32
_BATCH_SIZE_CPU = 8


def net_init(init: Callable[[Config], Model]) -> Callable[[Config], Model]:
    """Makes a ``net_init`` of a function that raises StartError: its message becomes the model's ``error``."""

    @functools.wraps(init)
    def wrapped(cfg: Config) -> Model:
        try:
            return init(cfg)
        except StartError as error:
            return {"error": str(error)}

    return wrapped


def load(cfg: Config, outputs: Sequence[str] = ()) -> Model:
    """A model with ``net``, ``batch_size``, ``transformer``, ``limits`` and ``synset_list``. Raises StartError.

    ``input_size`` is the width and height of the net's input. ``outputs`` names inner blobs to have as outputs too.
    """
    net = Net.load(cfg, outputs)
    if len(net.inputs) != 1 or len(net.input_shape(net.inputs[0])) != 3 or None in net.input_shape(net.inputs[0]):
        raise StartError(
            f"{cfg['custom_values'].get('net', 'classify')} takes nets with one image input of a fixed size; "
            f"this one has {net.inputs}"
        )
    channels, height, width = (int(size or 0) for size in net.input_shape(net.inputs[0]))
    return {
        "error": "",
        "net": net,
        "batch_size": cfg["batch_size"] or (_BATCH_SIZE_CPU if cfg["use_device"] == "CPU" else _BATCH_SIZE_GPU),
        "transformer": preprocess.transformer(cfg, (channels, height, width)),
        "input_size": (width, height),
        "limits": images.Limits.of_release(cfg["custom_values"]),
        "synset_list": labels.read(cfg["tar_files"].get("labels.csv")),
    }


def output(net: Net, cfg: Config, holds: str) -> str:
    """The output that ``custom_values.output`` names, or else the net's only one. Raises StartError."""
    name = Values("custom_values", cfg["custom_values"]).text("output", net.outputs[0])
    if name not in net.outputs or (len(net.outputs) > 1 and "output" not in cfg["custom_values"]):
        raise StartError(f"the net's outputs are {net.outputs}; custom_values.output should name the one of {holds}")
    return name


def pixels(model: Model, req: Req, net: str) -> images.Pixels:
    """The request's image, (height, width, 3) uint8 in BGR, upright. ``net``: whose it is. Raises InvalidArgument."""
    data = req["data"]
    if isinstance(data, list):
        raise InvalidArgument(f"{net} takes one image, not a list of them")
    return images.decode(data["body"], model["limits"])


def params(req: Req) -> dict[str, Any]:
    """The request's ``params``; empty where it has none. Raises InvalidArgument."""
    given = req.get("params")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise InvalidArgument("params should be an object")
    return given


def class_name(model: Model, index: int) -> str:
    """As ``labels.csv`` has it; the index as text where it has none."""
    names: dict[int, str] = model["synset_list"]
    return names.get(index, str(index))
