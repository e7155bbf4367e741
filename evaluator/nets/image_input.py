"""The base of the built-in nets: one image in, read and prepared as the release says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from atserving.errors import InvalidArgument, StartError
from evaluator.images import Pixels, read
from evaluator.net_config import NetConfig
from evaluator.net_contract import Req, Ret
from evaluator.nets import labels
from evaluator.runtime.device import Device
from evaluator.runtime.engine import Engine
from evaluator.runtime.graph import Graph, made_apart
from evaluator.runtime.net import Net
from evaluator.runtime.preprocessing import Geometry

if TYPE_CHECKING:
    import onnx


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
        self.net = Net.of(Engine(self._graph(config, device, outputs), device))
        # The conversion has checked that they are fixed.
        height, width, channels = (size or 0 for size in self.net.input_shape(self.net.inputs[0]))
        self.geometry = Geometry((channels, height, width), config.image_width)
        self.batch_size: int | None = device.batch_size
        self.input_size = (width, height)
        """The width and height of the net's input."""
        self._options = config.custom_values
        self._limits = config.limits
        reduced = config.custom_values.boolean("reduced_decode", False)
        self._least_size = self.geometry.resized if reduced else None
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

    def _graph(self, config: NetConfig, device: Device, outputs: Sequence[str]) -> Graph:
        """Convert the net. Raises StartError."""

        def make() -> onnx.ModelProto:
            from evaluator.runtime import conversion

            return conversion.for_pixels(config, device, outputs, self.name)

        return made_apart(make, config.workspace / "net.onnx") if config.workspace else Graph.of(make())

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
        return self.geometry.pixels(picture.pixels), picture.size

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
