"""onnxruntime on the device a release asks for."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from atserving.errors import StartError
from evaluator import cpus

Array = NDArray[np.float32]

_DTYPES: dict[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(uint8)": np.dtype(np.uint8)}
_CUDA = "CUDAExecutionProvider"

_spent = threading.local()


def spent_s() -> float:
    """The seconds that the calling thread has spent in engines so far."""
    return getattr(_spent, "seconds", 0.0)


@dataclass(frozen=True)
class Blob:
    """An input or output of a graph. ``shape`` is without the batch axis; None where the graph does not fix a size."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]


class Engine:
    """One onnxruntime session, for several threads at once."""

    def __init__(self, model: onnx.ModelProto, use_device: str = "CPU", intra_op_threads: int | None = None) -> None:
        """``use_device`` is ``CPU``, ``GPU`` or ``GPU:<index>``. Raises StartError where the device can't be had."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = intra_op_threads or cpus.available()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads that spin while they wait would take the CPU from decoding.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=_providers(use_device)
            )
        except Exception as error:
            # onnxruntime's errors have no common type worth naming; all mean that the graph or the device is unusable.
            raise StartError(f"onnxruntime can't load the net on {use_device}: {_first_line(error)}") from error
        # Where CUDA's libraries or the device are missing, onnxruntime only warns and goes on with the CPU.
        if use_device != "CPU" and self._session.get_providers()[0] != _CUDA:
            raise StartError(f"use_device is {use_device}, but onnxruntime can't use CUDA here (driver or libraries)")
        self.inputs = [_blob(value) for value in self._session.get_inputs()]
        self.outputs = [_blob(value) for value in self._session.get_outputs()]

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[Array]:
        """The named outputs for inputs (n, ...) of their dtype. Raises what onnxruntime raises."""
        began_s = time.perf_counter()
        results: list[Array] = self._session.run(list(outputs), dict(feeds))
        _spent.seconds = spent_s() + time.perf_counter() - began_s
        return results


def _providers(use_device: str) -> list[Any]:
    if use_device == "CPU":
        return ["CPUExecutionProvider"]
    if _CUDA not in onnxruntime.get_available_providers():
        raise StartError(f"use_device is {use_device}, but this onnxruntime has no CUDA (install atserving[gpu])")
    index = int(use_device.partition(":")[2] or 0)
    return [(_CUDA, {"device_id": index}), "CPUExecutionProvider"]


def _blob(value: Any) -> Blob:
    shape = tuple(size if isinstance(size, int) else None for size in value.shape[1:])
    return Blob(value.name, shape, _DTYPES[value.type])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
