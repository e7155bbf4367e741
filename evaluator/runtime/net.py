"""A converted Caffe net with the part of pycaffe's interface that scripts use: inputs, outputs, blobs, forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atserving.errors import StartError
from evaluator.net_config import NetConfig
from evaluator.runtime.device import Device
from evaluator.runtime.engine import Array, Engine
from evaluator.runtime.graph import Graph

TEST = 1
"""pycaffe's name for the only phase that exists here."""


class Blob:
    """The array of an input or output, as in ``net.blobs[name].data``."""

    def __init__(self, data: NDArray[Any]) -> None:
        self.data = data

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def reshape(self, *shape: int) -> None:
        """Resize the blob; its values are lost."""
        self.data = np.zeros(shape, self.data.dtype)


class Net:
    """A net, ``Net(prototxt, caffemodel, TEST)`` as in pycaffe.

    ``inputs`` and ``outputs`` are names, and ``blobs`` holds the arrays of both. The parameter ``outputs`` names inner
    blobs to have as outputs too. ``run`` is safe in several threads; ``forward``, which changes ``blobs``, is not.
    Raises StartError if the files can't be converted or the device is not available.
    """

    def __init__(
        self,
        prototxt: str | Path,
        caffemodel: str | Path,
        phase: int = TEST,
        *,
        outputs: Sequence[str] = (),
        use_device: str = "CPU",
        intra_op_threads: int | None = None,
    ) -> None:
        if phase != TEST:
            raise StartError("a net can only be loaded for testing")
        # A process that only runs nets does without it.
        from evaluator.runtime import conversion

        device = Device(use_device, intra_op_threads=intra_op_threads)
        self._use(Engine(Graph.of(conversion.of_files(prototxt, caffemodel, outputs)), device))

    @classmethod
    def of(cls, engine: Engine) -> Net:
        """Wrap the net of an engine."""
        net = cls.__new__(cls)
        net._use(engine)
        return net

    @staticmethod
    def load(config: NetConfig, outputs: Sequence[str] = ()) -> Net:
        """Load the net of a release; see the class for ``outputs``. Raises StartError."""
        from evaluator.runtime import conversion

        device = Device.of_release(config)
        return Net.of(Engine(Graph.of(conversion.of_release(config, device, outputs)), device))

    def shrink(self) -> None:
        """Give back the memory that larger batches took. Runs the net once."""
        self._engine.shrink()

    def _use(self, engine: Engine) -> None:
        self._engine = engine
        self.inputs = [blob.name for blob in engine.inputs]
        self.outputs = [blob.name for blob in engine.outputs]
        self._dtypes = {blob.name: blob.dtype for blob in engine.inputs}
        self.blobs = {
            blob.name: Blob(np.zeros((1, *(size or 1 for size in blob.shape)), blob.dtype))
            for blob in (*engine.inputs, *engine.outputs)
        }

    def input_shape(self, name: str) -> tuple[int | None, ...]:
        """Return the sizes of an input without its batch axis; None for a size that the net does not fix."""
        return next(blob.shape for blob in self._engine.inputs if blob.name == name)

    def output_shape(self, name: str) -> tuple[int | None, ...]:
        """Return the sizes of an output without its first axis; None for a size that the net does not fix."""
        return next(blob.shape for blob in self._engine.outputs if blob.name == name)

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Return the outputs (None: all) by name, (n, ...) float32, for the inputs by name, (n, ...).

        Copies no input that is contiguous and has its blob's dtype. Safe in several threads. Raises KeyError for an
        unknown name, and the errors of onnxruntime.
        """
        names = self.outputs if outputs is None else outputs
        feeds = {name: np.ascontiguousarray(array, self._dtypes[name]) for name, array in inputs.items()}
        return dict(zip(names, self._engine.run(names, feeds), strict=True))

    def reshape(self) -> None:
        """Do nothing. In pycaffe this makes room for inputs of other sizes."""

    def forward(self, given: Mapping[str, NDArray[Any]] | None = None, /, **named: NDArray[Any]) -> dict[str, Array]:
        """Run the net as pycaffe does: read missing inputs from ``blobs``, and leave the outputs there.

        Inputs come as one mapping or as keywords. Raises KeyError for an unknown input.
        """
        inputs = {**(given or {}), **named}
        for name in inputs:
            if name not in self.inputs:
                raise KeyError(f"the net has no input {name!r}")
        results = self.run({name: inputs.get(name, self.blobs[name].data) for name in self.inputs})
        for name, result in results.items():
            self.blobs[name].data = result
        return results
