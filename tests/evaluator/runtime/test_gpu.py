"""Nets on a GPU give the results of the CPU, with CUDA, with TensorRT and in float16, or say what is missing.

Tests that need a GPU are skipped elsewhere; the others run ``evaluator/runtime/gpu.py`` on the CPU.
"""

from __future__ import annotations

import ctypes.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from atserving.errors import StartError
from evaluator.caffe import convert
from evaluator.runtime import gpu
from evaluator.runtime.device import Device
from evaluator.runtime.engine import Engine
from evaluator.runtime.graph import Graph
from tests.caffe.nets import input_layer, layer, write_net
from tests.evaluator.built_in import Array, config, evaluate, files, loaded

HAS_CUDA = gpu.count() > 0 and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
HAS_TENSORRT = HAS_CUDA and ctypes.util.find_library("nvinfer") is not None
on_gpu = pytest.mark.skipif(not HAS_CUDA, reason="there is no GPU here, or no onnxruntime for it")
with_tensorrt = pytest.mark.skipif(not HAS_TENSORRT, reason="there is no GPU here, or no TensorRT for it")
without_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA"
)

CONV = "convolution_param { num_output: 16 kernel_size: 3 pad: 1 }"
NET = (
    input_layer(1, 3, 24, 32)
    + layer("Convolution", "data", "conv", CONV, "conv")
    + layer("ReLU", "conv", "conv", "", "relu")
    + layer("Pooling", "conv", "pool", "pooling_param { pool: MAX kernel_size: 2 stride: 2 }", "pool")
    + layer("InnerProduct", "pool", "fc", "inner_product_param { num_output: 9 }", "fc")
    + layer("Softmax", "fc", "prob")
)
BATCHES = (1, 8, 3, 5, 1, 2, 8)
OUTPUTS = ("prob", "fc")
GPU = Device("GPU", batch_size=8)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_net(tmp_path_factory.mktemp("net"), NET)


def graph(net: tuple[Path, Path]) -> onnx.ModelProto:
    return convert(*net, outputs=["fc"])


def batch(size: int) -> dict[str, Array]:
    return {"data": np.random.default_rng(size).normal(0, 1, (size, 3, 24, 32)).astype(np.float32)}


def assert_near(actual: Sequence[Array], expected: Sequence[Array], tolerance: float) -> None:
    """Assert that outputs are equal but for ``tolerance``, a share of the largest value of an output."""
    for output, wanted in zip(actual, expected, strict=True):
        assert (output.dtype, output.shape) == (np.dtype(np.float32), wanted.shape)
        np.testing.assert_allclose(output, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("device", "tolerance"),
    [
        pytest.param(replace(GPU, tf32=False), 1e-4, marks=on_gpu, id="cuda"),
        pytest.param(GPU, 5e-3, marks=on_gpu, id="cuda, tf32"),
        pytest.param(replace(GPU, fp16=True), 2e-2, marks=on_gpu, id="cuda, fp16"),
        pytest.param(replace(GPU, arena=False, gpu_mem_limit_mib=1024), 5e-3, marks=on_gpu, id="cuda, less memory"),
        pytest.param(replace(GPU, tensorrt=True), 1e-2, marks=with_tensorrt, id="tensorrt"),
        pytest.param(replace(GPU, tensorrt=True, fp16=True), 3e-2, marks=with_tensorrt, id="tensorrt, fp16"),
    ],
)
def test_gpu_gives_the_outputs_of_the_cpu(
    device: Device, tolerance: float, net: tuple[Path, Path], tmp_path: Path
) -> None:
    plain = Engine(Graph.of(graph(net)))
    model = gpu.halved(graph(net)) if device.halves_graph else graph(net)
    engine = Engine(Graph.of(model), replace(device, cache=tmp_path / "tensorrt"))
    expected = {size: plain.run(OUTPUTS, batch(size)) for size in BATCHES}
    for size in BATCHES:
        assert_near(engine.run(OUTPUTS, batch(size)), expected[size], tolerance)
    if device.tensorrt:
        # One engine for all sizes of batches.
        assert len(list((tmp_path / "tensorrt").glob("*.engine"))) == 1
    with ThreadPoolExecutor(4) as threads:
        sizes = BATCHES * 8
        for size, actual in zip(sizes, threads.map(lambda size: engine.run(OUTPUTS, batch(size)), sizes), strict=True):
            assert_near(actual, expected[size], tolerance)


@on_gpu
def test_built_in_net_gives_the_same_result_on_gpu_and_cpu(tmp_path: Path) -> None:
    release = files(tmp_path, NET)
    options = {"channel_swap": [2, 1, 0], "mean_values": [104, 117, 123], "input_scale": 0.017, "output": "prob"}
    pictures = [np.random.default_rng(seed).integers(0, 256, (40, 30, 3), np.uint8) for seed in range(5)]
    outputs_by_device = []
    for device in ("CPU", "GPU"):
        model = loaded("feature", config(release, use_device=device, **options))
        rets = evaluate(model, *((picture, None) for picture in pictures))
        outputs_by_device.append(np.stack([np.frombuffer(ret["result_file"], "<f4") for ret in rets]))
    assert_near(outputs_by_device[1:], outputs_by_device[:1], 5e-3)


@on_gpu
def test_missing_gpu_fails_to_load(net: tuple[Path, Path]) -> None:
    with pytest.raises(StartError, match=f"use_device is GPU:{gpu.count()}, but the last GPU here is"):
        Engine(Graph.of(graph(net)), Device(f"GPU:{gpu.count()}"))


def bound_runs(bound: onnxruntime.InferenceSession, sizes: Sequence[int]) -> list[list[Array]]:
    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(lambda size: gpu.run(bound, OUTPUTS, batch(size)), sizes))


def test_concurrent_calls_have_their_own_inputs_and_outputs(net: tuple[Path, Path]) -> None:
    plain = session(graph(net))
    expected = {size: plain.run(OUTPUTS, batch(size)) for size in BATCHES}
    sizes = BATCHES * 8
    # All outputs stay alive until the end, so that none may reuse another's memory.
    actual = bound_runs(session(graph(net)), sizes)
    for size, outputs in zip(sizes, actual, strict=True):
        assert_near(outputs, expected[size], 1e-6)


def test_run_returns_the_requested_outputs_in_order(net: tuple[Path, Path]) -> None:
    bound = session(graph(net))
    fc, prob = gpu.run(bound, ["fc", "prob"], batch(2))
    (alone,) = gpu.run(bound, ["fc"], batch(2))
    np.testing.assert_array_equal(alone, fc)
    assert prob.sum() == pytest.approx(2, abs=1e-5)


def test_halved_graph_keeps_float32_inputs_and_outputs(net: tuple[Path, Path]) -> None:
    halved = gpu.halved(graph(net))
    types = [value.type.tensor_type.elem_type for value in (*halved.graph.input, *halved.graph.output)]
    assert set(types) == {onnx.TensorProto.FLOAT}
    assert halved.ByteSize() < 0.6 * graph(net).ByteSize()
    assert {tensor.data_type for tensor in halved.graph.initializer if len(tensor.dims) > 1} == {
        onnx.TensorProto.FLOAT16
    }
    assert_near(session(halved).run(OUTPUTS, batch(3)), session(graph(net)).run(OUTPUTS, batch(3)), 2e-2)


def test_release_in_float16_keeps_pixels_and_means_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[onnx.ModelProto] = []

    class RecordingEngine(Engine):
        def __init__(self, graph: Graph, device: Device) -> None:
            assert isinstance(graph.source, bytes)
            models.append(onnx.load_from_string(graph.source))
            super().__init__(graph)

    monkeypatch.setattr("evaluator.nets.image_input.Engine", RecordingEngine)
    release = config(
        files(tmp_path, NET), use_device="GPU", mean_values=104.01, input_scale=0.017, model_params={"fp16": True}
    )
    model = loaded("feature", release)
    (ret,) = evaluate(model, (np.full((24, 32, 3), 200, np.uint8), None))
    assert len(ret["result_file"]) == 9 * 4
    nodes = {node.op_type: node for node in models[0].graph.node if node.name.startswith("pixels/")}
    tensors = {tensor.name: tensor for tensor in models[0].graph.initializer}
    assert nodes["Cast"].attribute[0].i == onnx.TensorProto.FLOAT
    assert tensors[nodes["Sub"].input[1]].data_type == onnx.TensorProto.FLOAT


def test_options_of_the_release_reach_the_providers(
    net: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    device = Device("GPU:1", tensorrt=True, fp16=True, gpu_mem_limit_mib=64, arena=False, cache=tmp_path / "cache")
    (tensorrt, its), (cuda, options), cpu = gpu.providers(replace(device, batch_size=12), Graph.of(graph(net)))
    assert [tensorrt, cuda, cpu] == names
    assert options == {
        "device_id": 1,
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": 1,
        "gpu_mem_limit": 64 << 20,
    }
    assert its["trt_profile_min_shapes"] == "data:1x3x24x32"
    assert its["trt_profile_opt_shapes"] == its["trt_profile_max_shapes"] == "data:12x3x24x32"
    assert its["trt_engine_cache_path"] == str(tmp_path / "cache")
    assert (its["device_id"], its["trt_fp16_enable"]) == (1, True)
    assert (tmp_path / "cache").is_dir()
    assert [provider[0] for provider in gpu.providers(GPU, Graph.of(graph(net)))[:1]] == ["CUDAExecutionProvider"]


@without_cuda
def test_gpu_release_is_refused_by_an_onnxruntime_without_cuda(net: tuple[Path, Path]) -> None:
    with pytest.raises(StartError, match="use_device is GPU:1, but this onnxruntime has no CUDA"):
        Engine(Graph.of(graph(net)), Device("GPU:1"))


class FakeOnnxruntime:
    """Acts as onnxruntime does without a GPU or without the libraries of CUDA or TensorRT.

    Its sessions get only some providers, without an error, or raise ``error``.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, gpus: int, session_providers: list[str], error: str = ""
    ) -> None:
        self._session = onnxruntime.InferenceSession
        self._providers, self._error = session_providers, error
        available = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
        monkeypatch.setattr(onnxruntime, "InferenceSession", self)
        monkeypatch.setattr(gpu, "count", lambda: gpus)

    def __call__(self, graph: bytes, options: Any, providers: list[Any], enable_fallback: int) -> Any:
        assert not enable_fallback
        if self._error:
            raise RuntimeError(self._error)
        made = self._session(graph, options, providers=["CPUExecutionProvider"])
        made.get_providers = lambda: self._providers
        return made


CPU_ONLY = ["CPUExecutionProvider"]
CUDA_AND_CPU = ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("device", "gpus", "session_providers", "error", "message"),
    [
        (Device("GPU"), 0, CPU_ONLY, "", "use_device is GPU, but .* there is no GPU, or no driver"),
        (Device("GPU:2"), 1, CPU_ONLY, "", "use_device is GPU:2, but the last GPU here is GPU:0"),
        (
            Device("GPU:2"),
            1,
            [],
            "CUDA failure 101: invalid device ordinal",
            "use_device is GPU:2, but the last GPU here",
        ),
        (Device("GPU"), 1, CPU_ONLY, "", r"use_device is GPU, but onnxruntime can't use CUDA here \(its libraries"),
        (Device("GPU", tensorrt=True), 1, CUDA_AND_CPU, "", "model_params.tensorrt is true, but onnxruntime can't use"),
        (
            Device("GPU", tensorrt=True),
            1,
            [],
            "Please install TensorRT libraries",
            "model_params.tensorrt is true, but onnxruntime can't use TensorRT here",
        ),
        (
            Device("GPU", tensorrt=True),
            1,
            [],
            "Following input(s) has no associated shape profiles provided: x",
            "model_params.tensorrt is true, but TensorRT can't run this net as a whole",
        ),
        (Device("GPU"), 1, [], "CUDA failure 2: out of memory\n at", "can't load the net on GPU: CUDA failure 2: out"),
    ],
)
def test_session_without_the_requested_provider_is_refused(
    device: Device,
    gpus: int,
    session_providers: list[str],
    error: str,
    message: str,
    net: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FakeOnnxruntime(monkeypatch, gpus, session_providers, error)
    with pytest.raises(StartError, match=message) as raised:
        Engine(Graph.of(graph(net)), device)
    assert "\n" not in str(raised.value)
