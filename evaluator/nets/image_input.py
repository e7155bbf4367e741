"""The base of the built-in nets: one image in, read and prepared as the release says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import onnx

from atserving.errors import InvalidArgument, StartError
from evaluator.images import Pixels, read
from evaluator.net_config import NetConfig
from evaluator.net_contract import Req, Ret
from evaluator.nets import labels
from evaluator.runtime import input_graph, preprocessing
from evaluator.runtime.device import Device
from evaluator.runtime.engine import Engine
from evaluator.runtime.net import Net, converted


class ImageNet(ABC):
    """A converted net whose only input is an image.

    The graph's input is (n, height, width, channels) uint8: the graph itself scales, swaps channels and subtracts the
    mean. It is a :class:`evaluator.net_contract.LoadedNet`.
    """

    name: ClassVar[str]
    """The name that a release gives in ``custom_values.net``."""

    def __init__(self, config: NetConfig, outputs: Sequence[str] = ()) -> None:
        """Load the net. ``outputs`` names inner blobs to have as outputs too. Raises StartError."""
        device = Device.of_release(config)
        graph = converted(config, device, outputs)
        shape = self._image_shape(graph)
        self.transformer = preprocessing.transformer(config, shape)
        input_graph.prepend(graph, self.transformer.arithmetic, on_cpu=device.is_cpu)
        self.net = Net.of(Engine(graph, device))
        self.batch_size: int | None = device.batch_size
        self.input_size = (shape[2], shape[1])
        """The width and height of the net's input."""
        self._options = config.custom_values
        self._limits = config.limits
        reduced = config.custom_values.boolean("reduced_decode", False)
        self._least_size = self.transformer.resized if reduced else None
        self._labels = labels.read(config.tar_files.get("labels.csv"))

    @abstractmethod
    def preprocess(self, req: Req) -> Any:
        """Prepare one request for :meth:`infer`. Raises InvalidArgument."""

    @abstractmethod
    def infer(self, reqid: str, reqs: Sequence[Any]) -> list[Ret]:
        """Run one forward pass over all requests."""

    def shrink(self) -> None:
        """Give back the memory that larger batches took. Runs the net once."""
        self.net.shrink()

    def _image_shape(self, graph: onnx.ModelProto) -> tuple[int, int, int]:
        """Return (channels, height, width) of the only input. Raises StartError."""
        inputs = {
            value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.graph.input
        }
        sizes = next(iter(inputs.values()), [])[1:]
        if len(inputs) != 1 or len(sizes) != 3 or 0 in sizes:
            raise StartError(
                f"{self.name} takes nets with one image input of a fixed size; this one has {list(inputs)}"
            )
        channels, height, width = sizes
        return channels, height, width

    def output(self, holds: str) -> str:
        """Return the output that ``custom_values.output`` names, or else the net's only one. Raises StartError."""
        outputs = self.net.outputs
        name = self._options.text("output", outputs[0])
        if name not in outputs or (len(outputs) > 1 and "output" not in self._options):
            raise StartError(f"the net's outputs are {outputs}; custom_values.output should name the one of {holds}")
        return name

    def image(self, req: Req) -> tuple[Pixels, tuple[int, int]]:
        """Return the net's input, (height, width, channels) uint8, and the (width, height) of the whole upright image.

        Raises InvalidArgument.
        """
        data = req["data"]
        if isinstance(data, list):
            raise InvalidArgument(f"{self.name} takes one image, not a list of them")
        picture = read(data["body"], self._limits, self._least_size)
        return self.transformer.pixels(picture.pixels), picture.size

    def class_name(self, index: int) -> str:
        """Return the name in ``labels.csv``; the index as text if there is none."""
        return self._labels.get(index, str(index))


def params(req: Req) -> dict[str, Any]:
    """Return the request's ``params``; empty if it has none. Raises InvalidArgument."""
    given = req.get("params")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise InvalidArgument("params should be an object")
    return given
