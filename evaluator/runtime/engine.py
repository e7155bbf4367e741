"""Runs graphs with onnxruntime on the release's device."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from atserving.errors import StartError
from evaluator.runtime import cpus, gpu
from evaluator.runtime.device import CPU, Device
from evaluator.runtime.graph import Graph

Array = NDArray[np.float32]

_DTYPES: dict[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(uint8)": np.dtype(np.uint8)}

_spent = threading.local()


def spent_s() -> float:
    """Return the seconds that the calling thread has spent in engines so far."""
    return getattr(_spent, "seconds", 0.0)


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph. ``shape`` omits the batch axis; None stands for a size that is not fixed."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]


class Engine:
    """One onnxruntime session. Safe in several threads."""

    def __init__(self, graph: Graph, device: Device = CPU) -> None:
        """Raises StartError if onnxruntime can't load the graph or has no such device; there is no fallback."""
        self._session = _session(graph, device)
        self._on_cpu = device.is_cpu
        self._has_arena = device.is_cpu and device.arena
        self.inputs = [_tensor_spec(value) for value in self._session.get_inputs()]
        self.outputs = [_tensor_spec(value) for value in self._session.get_outputs()]

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[Array]:
        """Return the named outputs for contiguous inputs (n, ...) of the right dtype. Raises onnxruntime's errors."""
        began_s = time.perf_counter()
        try:
            return self._run(outputs, feeds)
        finally:
            _spent.seconds = spent_s() + time.perf_counter() - began_s

    def shrink(self) -> None:
        """Run a batch of one, and give back what onnxruntime's arena holds beyond it. For a GPU it does nothing."""
        if not self._has_arena:
            return
        feeds = {each.name: np.zeros((1, *(size or 1 for size in each.shape)), each.dtype) for each in self.inputs}
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        # Results in the arena would keep a part of it.
        for each, array in zip(self.outputs, self._session.run(None, feeds), strict=True):
            binding.bind_ortvalue_output(each.name, onnxruntime.OrtValue.ortvalue_from_numpy(np.array(array)))
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._session.run_with_iobinding(binding, options)

    def _run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[Array]:
        if not self._on_cpu:
            return gpu.run(self._session, outputs, feeds)
        # This reads the arrays in place and returns views of onnxruntime's memory.
        results: list[Array] = self._session.run(list(outputs), dict(feeds))
        return results


def _session(graph: Graph, device: Device) -> onnxruntime.InferenceSession:
    providers = ["CPUExecutionProvider"] if device.is_cpu else gpu.providers(device, graph)
    try:
        # With the fallback onnxruntime would silently use the CPU, at start or after a failed batch.
        session = onnxruntime.InferenceSession(graph.source, _options(device), providers=providers, enable_fallback=0)
    except Exception as error:
        # onnxruntime's errors have no useful common type; all mean that the graph or the device is unusable.
        missing = None if device.is_cpu else gpu.missing(device, error)
        raise StartError(missing or f"onnxruntime can't load the net on {device.name}: {_first_line(error)}") from error
    if not device.is_cpu:
        gpu.refuse_less(device, session.get_providers())
    return session


def _options(device: Device) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = device.intra_op_threads or cpus.available()
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = device.arena
    options.log_severity_level = 3
    # Spinning threads take CPU time from decoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(device.spinning)))
    return options


def _tensor_spec(value: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else None for size in value.shape[1:])
    return TensorSpec(value.name, shape, _DTYPES[value.type])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
