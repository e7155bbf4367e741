"""The GPU's part of the runtime: options of the providers, messages for missing hardware, float16, IO binding.

The engine uses this module only if ``use_device`` is a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from atserving.errors import StartError
from evaluator.runtime.device import Device
from evaluator.runtime.graph import Graph

if TYPE_CHECKING:
    import onnx

_CUDA = "CUDAExecutionProvider"
_TENSORRT = "TensorrtExecutionProvider"
_CPU = "CPUExecutionProvider"
_ERRORS_ONLY = 3


def providers(device: Device, graph: Graph) -> list[Any]:
    """Return the execution providers for ``graph``, best first. The CPU runs operators without a GPU kernel.

    Raises StartError if this build of onnxruntime lacks the provider.
    """
    available = onnxruntime.get_available_providers()
    if _CUDA not in available:
        raise StartError(
            f"use_device is {device.name}, but this onnxruntime has no CUDA: install the extra gpu in place of cpu"
        )
    if device.tensorrt and _TENSORRT not in available:
        raise StartError("model_params.tensorrt is true, but this onnxruntime has no TensorRT")
    onnxruntime.set_default_logger_severity(_ERRORS_ONLY)
    # CUDA may be installed as Python packages, where the system's loader does not look.
    onnxruntime.preload_dlls()
    wanted: list[Any] = [(_CUDA, _cuda_options(device)), _CPU]
    if device.tensorrt:
        wanted.insert(0, (_TENSORRT, _tensorrt_options(device, graph)))
    return wanted


def _cuda_options(device: Device) -> dict[str, Any]:
    options: dict[str, Any] = {
        "device_id": device.index,
        # Double the arena when it runs out, or extend it only as needed.
        "arena_extend_strategy": "kNextPowerOfTwo" if device.arena else "kSameAsRequested",
        "cudnn_conv_algo_search": device.cudnn_conv_algo_search,
        "use_tf32": int(device.tf32),
    }
    if device.gpu_mem_limit_mib:
        options["gpu_mem_limit"] = device.gpu_mem_limit_mib << 20
    return options


def _tensorrt_options(device: Device, graph: Graph) -> dict[str, Any]:
    """Give profiles for all batches up to the largest: TensorRT would rebuild its engine for another size."""
    options: dict[str, Any] = {
        "device_id": device.index,
        "trt_fp16_enable": device.fp16,
        "trt_profile_min_shapes": _shapes(graph, 1),
        "trt_profile_opt_shapes": _shapes(graph, device.batch_size),
        "trt_profile_max_shapes": _shapes(graph, device.batch_size),
    }
    if device.cache:
        device.cache.mkdir(parents=True, exist_ok=True)
        options |= {
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(device.cache),
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": str(device.cache),
        }
    return options


def _shapes(graph: Graph, batch: int) -> str:
    """Format the inputs' shapes for TensorRT's provider, ``name:1x3x224x224,...``; an axis that is not fixed is 1."""
    shapes = {name: [batch, *(size or 1 for size in sizes[1:])] for name, sizes in graph.inputs.items()}
    return ",".join(f"{name}:{'x'.join(map(str, sizes))}" for name, sizes in shapes.items())


def refuse_less(device: Device, got: Iterable[str]) -> None:
    """Raise StartError if a session lacks a provider; onnxruntime itself only warns."""
    for name in ([_TENSORRT] if device.tensorrt else []) + [_CUDA]:
        if name not in got:
            raise StartError(_why(device, name))


def missing(device: Device, error: Exception) -> str | None:
    """Explain a failed session by the missing hardware or library; None if the device is not the cause."""
    if device.index >= count():
        return _why(device, _CUDA)
    if device.tensorrt and "TensorRT libraries" in str(error):
        return _why(device, _TENSORRT)
    # TensorRT needs the sizes between the parts of a split graph, which only onnxruntime knows.
    if device.tensorrt and "no associated shape profiles" in str(error):
        return "model_params.tensorrt is true, but TensorRT can't run this net as a whole"
    return None


def _why(device: Device, missing: str) -> str:
    gpus = count()
    if not gpus:
        return f"use_device is {device.name}, but onnxruntime can't use CUDA here: there is no GPU, or no driver"
    if device.index >= gpus:
        return f"use_device is {device.name}, but the last GPU here is GPU:{gpus - 1}"
    if missing == _TENSORRT:
        return "model_params.tensorrt is true, but onnxruntime can't use TensorRT here (its libraries; see the log)"
    return f"use_device is {device.name}, but onnxruntime can't use CUDA here (its libraries; see the log)"


def count() -> int:
    """Return the number of GPUs that CUDA's driver knows; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    number = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(number)):
        return 0
    return number.value


def uuid(index: int) -> str:
    """Return the UUID of a GPU, in hexadecimal, by CUDA's index; with MIG, that of the part that CUDA uses.

    Empty if the driver does not tell it.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    handle, found = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), index) or driver.cuDeviceGetUuid_v2(found, handle):
        return ""
    return bytes(found).hex()


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert a model to float16 inside, with float32 inputs and outputs; the given model must not be used again.

    Operators without float16 on some device, such as NonMaxSuppression, keep float32.
    """
    # Import it here: it is slow, and it changes sys.path.
    from onnxruntime.transformers.float16 import convert_float_to_float16

    # The Caffe converter has set the type and shape of every value.
    converted: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True)
    return converted


def run(
    session: onnxruntime.InferenceSession, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]
) -> list[NDArray[np.float32]]:
    """Run a session, and copy each input and output at most once between host and device.

    Each call has its own binding, so several threads may call at once.
    """
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    for name in outputs:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    # Views of onnxruntime's memory; copy_outputs_to_cpu would copy them again.
    return [value.numpy() for value in binding.get_outputs()]
