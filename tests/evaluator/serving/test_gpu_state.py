"""An instance on a GPU shows the GPU's memory and load, and goes on without them if the driver tells nothing."""

from __future__ import annotations

import ctypes.util
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from atserving.held import HeldBytes
from evaluator.runtime import gpu
from evaluator.serving import gpu_state
from evaluator.serving.gpu_state import GpuReader, GpuState, checked, read
from evaluator.serving.pipeline import Pipeline
from tests.evaluator.runtime.test_gpu import on_gpu
from tests.evaluator.serving.fronts import pipeline
from tests.evaluator.serving.test_ops_http import samples
from tests.metric_text import families
from tests.processes import Registry, evaluator

HEX = "8f1c2a3b00112233445566778899aabb"
UUID = "8f1c2a3b-0011-2233-4455-66778899aabb"
STATE = GpuState(f"GPU-{UUID}", 3 << 30, 80 << 30, 0.25)

without_driver = pytest.mark.skipif(
    ctypes.util.find_library("nvidia-ml") is not None, reason="there is a driver of NVIDIA here"
)


async def shown(served: Pipeline) -> dict[str, tuple[str, float]]:
    """Return the GPU's metrics."""
    text, content_type = await served.metrics.page("")
    return {
        sample.name.removeprefix("atserving_evaluator_gpu_"): (sample.labels["gpu"], sample.value)
        for family in families(text.decode(), content_type)
        for sample in family.samples
        if "_gpu_" in sample.name
    }


def serve(folder: Path, reader: GpuReader) -> Pipeline:
    served = pipeline(folder, HeldBytes(1 << 20))
    served.metrics.of_gpu(reader)
    return served


async def test_metrics_show_the_state_of_the_gpu(tmp_path: Path) -> None:
    states = iter([STATE, GpuState(f"MIG-{UUID}", 1, 2, None)])
    served = serve(tmp_path, GpuReader(UUID, lambda _: next(states)))
    assert await shown(served) == {
        "memory_used_bytes": (STATE.gpu, 3 << 30),
        "memory_total_bytes": (STATE.gpu, 80 << 30),
        "utilisation_ratio": (STATE.gpu, 0.25),
    }
    # A part of a GPU tells no load.
    assert await shown(served) == {"memory_used_bytes": (f"MIG-{UUID}", 1), "memory_total_bytes": (f"MIG-{UUID}", 2)}
    assert not await shown(pipeline(tmp_path, HeldBytes(1 << 20)))


@without_driver
async def test_no_driver_costs_a_line_and_no_metric(tmp_path: Path) -> None:
    served = serve(tmp_path, GpuReader(UUID))
    for _ in range(2):
        with capture_logs() as lines:
            assert not await shown(served)
        assert [(each["event"], each["log_level"]) for each in lines] == [("gpu unread", "debug")]
        assert lines[0]["reason"] == "NVML Shared Library Not Found"


async def test_a_driver_that_hangs_holds_up_no_scrape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_state, "_MOST_S", 0.01)
    answering, calls = threading.Event(), []

    def slow(id_: str) -> GpuState:
        calls.append(id_)
        answering.wait()
        return STATE

    served = serve(tmp_path, GpuReader(UUID, slow))
    with capture_logs() as lines:
        for _ in range(3):
            assert not await shown(served)
    assert {each["event"] for each in lines} == {"gpu unread"}
    assert len(calls) == 1, "one thread waits, not one for each scrape"
    answering.set()
    monkeypatch.setattr(gpu_state, "_MOST_S", 60.0)
    assert await shown(served)
    assert await shown(served)
    assert len(calls) == 2


def test_a_driver_that_hangs_holds_up_no_stop() -> None:
    program = """
import asyncio, threading
from evaluator.serving import gpu_state
gpu_state._MOST_S = 0.01
assert asyncio.run(gpu_state.GpuReader("x", lambda _: threading.Event().wait()).state()) is None
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_front_and_the_worker_import_nothing_of_nvml() -> None:
    program = "import sys, evaluator.serving.instance, evaluator.worker.main; assert 'pynvml' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(
    ("told", "found"),
    [(HEX, UUID), (UUID, UUID), ("", ""), (None, ""), (0, ""), ([HEX], ""), ("GPU-" + HEX, ""), (HEX + '"} 1\n', "")],
)
def test_a_worker_can_not_make_up_a_label(told: object, found: str) -> None:
    assert checked(told) == found


@on_gpu
async def test_an_instance_on_a_gpu_shows_it(registry: Registry) -> None:
    registry.publish("on-gpu", custom_values={"net": "classify"}, use_device="GPU:0")
    with evaluator(registry, "on-gpu") as process:
        found = await samples(process)
    gpu_name = f"GPU-{checked(gpu.uuid(0))}"
    assert 0 < found["gpu_memory_used_bytes", gpu_name] <= found["gpu_memory_total_bytes", gpu_name]


@on_gpu
def test_cuda_and_nvml_mean_the_same_gpu() -> None:
    state = read(checked(gpu.uuid(0)))
    assert 0 < state.used_bytes <= state.total_bytes
    assert state.utilisation is None or 0 <= state.utilisation <= 1
