"""What the built-in nets have in common: one image in, read and prepared as the release says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import onnx

from atserving.errors import InvalidArgument, StartError
from evaluator.images import Pixels, read
from evaluator.limits import Limits
from evaluator.net_contract import Config, Model, Req
from evaluator.nets import labels
from evaluator.options import Options
from evaluator.runtime import input_graph, preprocessing
from evaluator.runtime.device import Device
from evaluator.runtime.engine import Engine
from evaluator.runtime.net import Net, converted


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
    """A model with ``net``, ``batch_size``, ``transformer``, ``limits``, ``least`` and ``synset_list``.

    ``input_size`` is the width and height of the net's input, which is (n, height, width, channels) uint8: the rest of
    what the release does to pixels is in its graph. ``outputs`` names inner blobs to have as outputs too. Raises
    StartError.
    """
    device = Device.of_release(cfg)
    graph = converted(cfg, device, outputs)
    shape = _image_shape(graph, cfg)
    transformer = preprocessing.transformer(cfg, shape)
    input_graph.prepend(graph, transformer.arithmetic, on_cpu=device.is_cpu)
    reduced = Options("custom_values", cfg["custom_values"]).boolean("reduced_decode", False)
    return {
        "error": "",
        "net": Net.of(Engine(graph, device)),
        "batch_size": device.batch_size,
        "transformer": transformer,
        "input_size": (shape[2], shape[1]),
        "limits": Limits.of_release(cfg["custom_values"]),
        "least": transformer.resized if reduced else None,
        "synset_list": labels.read(cfg["tar_files"].get("labels.csv")),
    }


def _image_shape(graph: onnx.ModelProto, cfg: Config) -> tuple[int, int, int]:
    """(channels, height, width) of the only input. Raises StartError."""
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.graph.input}
    sizes = next(iter(shapes.values()), [])[1:]
    if len(shapes) != 1 or len(sizes) != 3 or 0 in sizes:
        raise StartError(
            f"{cfg['custom_values'].get('net', 'classify')} takes nets with one image input of a fixed size; "
            f"this one has {list(shapes)}"
        )
    channels, height, width = sizes
    return channels, height, width


def output(net: Net, cfg: Config, holds: str) -> str:
    """The output that ``custom_values.output`` names, or else the net's only one. Raises StartError."""
    name = Options("custom_values", cfg["custom_values"]).text("output", net.outputs[0])
    if name not in net.outputs or (len(net.outputs) > 1 and "output" not in cfg["custom_values"]):
        raise StartError(f"the net's outputs are {net.outputs}; custom_values.output should name the one of {holds}")
    return name


def image(model: Model, req: Req, net: str) -> tuple[Pixels, tuple[int, int]]:
    """What the net sees of the request's image, (height, width, channels) uint8, and the size of the whole image.

    That is (width, height) once it is upright. ``net``: whose image it is. Raises InvalidArgument.
    """
    data = req["data"]
    if isinstance(data, list):
        raise InvalidArgument(f"{net} takes one image, not a list of them")
    picture = read(data["body"], model["limits"], model["least"])
    return model["transformer"].pixels(picture.pixels), picture.size


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
