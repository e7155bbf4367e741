"""A converted Caffe net with the part of pycaffe's interface that scripts use: inputs, outputs, blobs, forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atserving.errors import StartError
from evaluator.caffe import ConversionError, convert
from evaluator.engine import Array, Engine
from evaluator.values import Values

TEST = 1
"""pycaffe's name for the only phase there is here."""


class Blob:
    """An input's or output's array, as ``net.blobs[name].data``."""

    def __init__(self, data: Array) -> None:
        self.data = data

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def reshape(self, *shape: int) -> None:
        """Makes the blob that large; what it held is lost."""
        self.data = np.zeros(shape, np.float32)


class Net:
    """``Net(prototxt, caffemodel, TEST)``, as in pycaffe. Not for use from several threads at once.

    ``inputs`` and ``outputs`` are names, ``blobs`` the arrays of both; the parameter ``outputs`` names inner blobs that
    shall be outputs too. Raises StartError where the files can't be
    converted or the device can't be had.
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
        try:
            model = convert(Path(prototxt), Path(caffemodel), outputs=outputs)
        except ConversionError as error:
            raise StartError(f"the net can't be converted: {error}") from error
        self._engine = Engine(model, use_device, intra_op_threads)
        self.inputs = [blob.name for blob in self._engine.inputs]
        self.outputs = [blob.name for blob in self._engine.outputs]
        sizes = {blob.name: blob.shape for blob in (*self._engine.inputs, *self._engine.outputs)}
        self.blobs = {
            name: Blob(np.zeros((1, *(size or 1 for size in shape)), np.float32)) for name, shape in sizes.items()
        }

    @staticmethod
    def load(cfg: Mapping[str, Any], outputs: Sequence[str] = ()) -> Net:
        """The net of a release, from the ``cfg`` of ``net_init``; see the class for ``outputs``. Raises StartError."""
        files = cfg["tar_files"]
        for name in ("deploy.prototxt", "weight.caffemodel"):
            if name not in files:
                raise StartError(f"the release's tar has no {name}")
        threads = Values("model_params", cfg["model_params"]).optional_positive_int("intra_op_threads")
        return Net(
            files["deploy.prototxt"],
            files["weight.caffemodel"],
            outputs=outputs,
            use_device=cfg["use_device"],
            intra_op_threads=threads,
        )

    def input_shape(self, name: str) -> tuple[int | None, ...]:
        """The sizes of an input without its batch axis; None where the net does not fix one."""
        return next(blob.shape for blob in self._engine.inputs if blob.name == name)

    def output_shape(self, name: str) -> tuple[int | None, ...]:
        """The sizes of an output without its first axis; None where the net does not fix one."""
        return next(blob.shape for blob in self._engine.outputs if blob.name == name)

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """The outputs (None: all) by name, (n, ...) float32, for every input by name, (n, ...).

        Raises what onnxruntime raises.
        """
        names = self.outputs if outputs is None else outputs
        feeds = {name: np.ascontiguousarray(array, np.float32) for name, array in inputs.items()}
        return dict(zip(names, self._engine.run(names, feeds), strict=True))

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
