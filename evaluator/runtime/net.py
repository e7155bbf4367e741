"""A converted Caffe net with the part of pycaffe's interface that scripts use: inputs, outputs, blobs, forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from atserving.errors import StartError
from evaluator.caffe import ConversionError, convert
from evaluator.runtime import gpu
from evaluator.runtime.device import Device
from evaluator.runtime.engine import Array, Engine

TEST = 1
"""pycaffe's name for the only phase there is here."""


class Blob:
    """An input's or output's array, as ``net.blobs[name].data``."""

    def __init__(self, data: NDArray[Any]) -> None:
        self.data = data

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def reshape(self, *shape: int) -> None:
        """Makes the blob that large; what it held is lost."""
        self.data = np.zeros(shape, self.data.dtype)


def converted(cfg: Mapping[str, Any], device: Device, outputs: Sequence[str] = ()) -> onnx.ModelProto:
    """The net of a release as an ONNX model, from the ``cfg`` of ``net_init``; see Net for ``outputs``.

    Its inputs and outputs are float32, whatever ``device`` wants inside. Raises StartError.
    """
    files = cfg["tar_files"]
    for name in ("deploy.prototxt", "weight.caffemodel"):
        if name not in files:
            raise StartError(f"the release's tar has no {name}")
    model = _converted(files["deploy.prototxt"], files["weight.caffemodel"], outputs)
    return gpu.halved(model) if device.halves_graph else model


def _converted(prototxt: str | Path, caffemodel: str | Path, outputs: Sequence[str]) -> onnx.ModelProto:
    try:
        return convert(Path(prototxt), Path(caffemodel), outputs=outputs)
    except ConversionError as error:
        raise StartError(f"the net can't be converted: {error}") from error


class Net:
    """``Net(prototxt, caffemodel, TEST)``, as in pycaffe.

    ``inputs`` and ``outputs`` are names, ``blobs`` the arrays of both; the parameter ``outputs`` names inner blobs that
    shall be outputs too. ``run`` is for several threads at once; ``forward`` and ``blobs``, which it changes, are for
    one. Raises StartError where the files can't be converted or the device can't be had.
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
        device = Device(use_device, intra_op_threads=intra_op_threads)
        self._use(Engine(_converted(prototxt, caffemodel, outputs), device))

    @classmethod
    def of(cls, engine: Engine) -> Net:
        """The net that an engine holds."""
        net = cls.__new__(cls)
        net._use(engine)
        return net

    @staticmethod
    def load(cfg: Mapping[str, Any], outputs: Sequence[str] = ()) -> Net:
        """The net of a release, from the ``cfg`` of ``net_init``; see the class for ``outputs``. Raises StartError."""
        device = Device.of_release(cfg)
        return Net.of(Engine(converted(cfg, device, outputs), device))

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
        """The sizes of an input without its batch axis; None where the net does not fix one."""
        return next(blob.shape for blob in self._engine.inputs if blob.name == name)

    def output_shape(self, name: str) -> tuple[int | None, ...]:
        """The sizes of an output without its first axis; None where the net does not fix one."""
        return next(blob.shape for blob in self._engine.outputs if blob.name == name)

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """The outputs (None: all) by name, (n, ...) float32, for every input by name, (n, ...).

        An input that is contiguous and of its blob's dtype is not copied. For several threads at once. Raises
        KeyError for one that the net does not have, and what onnxruntime raises.
        """
        names = self.outputs if outputs is None else outputs
        feeds = {name: np.ascontiguousarray(array, self._dtypes[name]) for name, array in inputs.items()}
        return dict(zip(names, self._engine.run(names, feeds), strict=True))

    def reshape(self) -> None:
        """As pycaffe's, where it makes room for inputs of other sizes: here that needs nothing."""

    def forward(self, given: Mapping[str, NDArray[Any]] | None = None, /, **named: NDArray[Any]) -> dict[str, Array]:
        """As pycaffe's: like :meth:`run`, with the inputs not given read from ``blobs``, and the outputs left there.

        Inputs come as one mapping or as keywords. Raises KeyError for one that the net does not have.
        """
        inputs = {**(given or {}), **named}
        for name in inputs:
            if name not in self.inputs:
                raise KeyError(f"the net has no input {name!r}")
        results = self.run({name: inputs.get(name, self.blobs[name].data) for name in self.inputs})
        for name, result in results.items():
            self.blobs[name].data = result
        return results
