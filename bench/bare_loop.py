"""A net without a service: loops in this process decode, resize and run onnxruntime."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.measurement import Row, quantiles_ms
from bench.picture_net import PictureNet
from bench.workload import Workload
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

    def __init__(self, workload: Workload, folder: Path) -> None:
        """``folder`` is for the converted net."""
        self._workload = workload
        self.file = workload.convert(folder)
        self._nets: dict[int, PictureNet] = {}

    def measure(self, setting: Setting, seconds: float, *, decodes: bool) -> Row:
        """Run for about ``seconds``; without ``decodes``, every batch is ready beforehand."""
        net = self._net(setting.threads)

        def batch() -> NDArray[np.float32]:
            return np.stack([net.planes(self._workload.image) for _ in range(setting.batch)])

        ready = batch()

        def run_batch() -> None:
            net.scores(batch() if decodes else ready)

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

    def _net(self, threads: int) -> PictureNet:
        if threads not in self._nets:
            self._nets[threads] = PictureNet(self.file, threads)
        return self._nets[threads]


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
