"""A net without a service: loops in this process decode, resize and run onnxruntime."""

from __future__ import annotations

import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from bench.measurement import Row, quantiles_ms
from bench.workload import Workload
from evaluator.caffe import convert
from evaluator.runtime import cpus

_BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Setting:
    """How many loops run at a time, onnxruntime's threads in each, and how many images a batch has."""

    loops: int
    threads: int
    batch: int

    def __str__(self) -> str:
        return f"{self.loops} x {self.threads}, batch {self.batch}"


class BareLoop:
    """The net of a workload, run in loops. Nothing is received, queued or answered."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        with tempfile.TemporaryDirectory() as folder, tarfile.open(workload.tar) as archive:
            archive.extractall(folder, filter="data")
            model = convert(Path(folder) / "deploy.prototxt", Path(folder) / "weight.caffemodel")
        self._model = model.SerializeToString()
        _, _, self._height, self._width = (dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim)
        self._sessions: dict[int, onnxruntime.InferenceSession] = {}

    def measure(self, setting: Setting, seconds: float, *, decodes: bool) -> Row:
        """Run for about ``seconds``; without ``decodes``, every batch is ready beforehand."""
        session = self._session(setting.threads)
        name = session.get_inputs()[0].name
        ready = self._batch(setting.batch)

        def run_batch() -> None:
            session.run(None, {name: self._batch(setting.batch) if decodes else ready})

        run_batch()
        took_s, cpu_s, wall_s = _repeat(run_batch, setting.loops, seconds)
        count = len(took_s) * setting.batch
        what = f"{'decode, resize, ' if decodes else ''}onnxruntime, {setting}"
        cpu_ms = {"loop": round(cpu_s / count * 1e3, 3)}
        return Row(self._workload.name, what, count / wall_s, *quantiles_ms(took_s), cpu_ms)

    def best(self, seconds: float, *, decodes: bool) -> tuple[Setting, list[Row]]:
        """Try several settings; return the one with the most images per second, and the rows of all."""
        available = cpus.available()
        shapes = {(1, 1), (available, 1), (1, available)}
        settings = [Setting(*shape, batch) for shape in sorted(shapes) for batch in _BATCHES]
        rows = [self.measure(setting, seconds, decodes=decodes) for setting in settings]
        return max(zip(settings, rows, strict=True), key=lambda pair: pair[1].per_s)[0], rows

    def _session(self, threads: int) -> onnxruntime.InferenceSession:
        if threads not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            self._sessions[threads] = onnxruntime.InferenceSession(
                self._model, options, providers=["CPUExecutionProvider"]
            )
        return self._sessions[threads]

    def _batch(self, size: int) -> NDArray[np.float32]:
        return np.stack([self._planes() for _ in range(size)])

    def _planes(self) -> NDArray[np.float32]:
        pixels = cv2.imdecode(np.frombuffer(self._workload.image, np.uint8), cv2.IMREAD_COLOR)
        assert pixels is not None
        resized = cv2.resize(pixels, (self._width, self._height), interpolation=cv2.INTER_LINEAR)
        return np.subtract(resized, np.array(self._workload.mean, np.float32), dtype=np.float32).transpose(2, 0, 1)


def _repeat(work: Callable[[], None], loops: int, seconds: float) -> tuple[list[float], float, float]:
    """Repeat ``work`` in each of several threads; return what each run took, the CPU seconds, and the wall seconds."""
    took_s: list[float] = []
    until_s = time.perf_counter() + seconds

    def loop() -> None:
        while True:
            began_s = time.perf_counter()
            work()
            ended_s = time.perf_counter()
            took_s.append(ended_s - began_s)
            if ended_s >= until_s:
                return

    threads = [threading.Thread(target=loop) for _ in range(loops)]
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took_s, time.process_time() - cpu_s, time.perf_counter() - wall_s
