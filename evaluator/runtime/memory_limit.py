"""Bounds the memory of this process, so that a request fails for want of it, and not all in the pod with it.

The kernel kills a process of a pod that is over its limit, perhaps the front. A process with a limit of its own gets an
error from the allocation that goes beyond it, which becomes the answer of one request.
"""

from __future__ import annotations

import math
import resource
from pathlib import Path

import cv2
from google.protobuf.message import DecodeError

from atserving.errors import Unavailable
from evaluator.net_config import NetConfig
from evaluator.runtime import cpus, memory

# With less than this to take, a worker answers nothing.
_LEAST_BYTES = 64 << 20
# The stacks of the threads that libraries make for each CPU while a net is loaded: mapped, and hardly taken.
_STACKS_BYTES = 32 << 20
_OWN = Path("/proc/self/status")
_PROTOBUF_TEXT = "alloc failed"
_ORT_TEXTS = ("Failed to allocate memory", "bad_alloc")


def chosen_bytes(config: NetConfig, spare_bytes: int) -> float:
    """Return how much the process may take: ``model_params.memory_mib``, or its pod's limit less ``spare_bytes``.

    From a small pod it gets half. If there is neither, a script gets what the machine has left, and a built-in net is
    not bounded. Infinite for a GPU, too, as CUDA maps far more memory than it takes. Raises StartError.
    """
    chosen_mib = config.model_params.optional_positive_int("memory_mib")
    return chosen_mib << 20 if chosen_mib else _left_bytes(config, spare_bytes)


def bound_load(config: NetConfig, spare_bytes: int) -> None:
    """Let the load of a script map twice what the pod or the machine has left; ``memory_mib`` is for its requests.

    Libraries map more than they take, while a net is loaded above all.
    """
    bound(2 * _left_bytes(config, spare_bytes) + _STACKS_BYTES * cpus.available(), for_good=True)


def _left_bytes(config: NetConfig, spare_bytes: int) -> float:
    if config.use_device != "CPU":
        return math.inf
    limit = memory.limit_bytes()
    if config.script and math.isinf(limit):
        return memory.available_bytes()
    return max(limit - spare_bytes, limit / 2)


def bound(most_bytes: float, *, for_good: bool = False) -> None:
    """Let this process take up to ``most_bytes``. Call this when it has its threads and has loaded its net.

    The kernel counts what is mapped (RLIMIT_DATA), which is more than what is taken: stacks, for one. So the limit is
    what is mapped now and what may still be taken. Files that are only read do not count. ``for_good``: the process
    can't lift the limit.
    """
    if math.isinf(most_bytes):
        return
    sizes = dict(line.split(":", 1) for line in _OWN.read_text().splitlines())
    mapped, taken = (int(sizes[name].split()[0]) * 1024 for name in ("VmData", "RssAnon"))
    most = mapped + max(int(most_bytes) - taken, _LEAST_BYTES)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most if for_good else hard))


def exhausted() -> Unavailable:
    """Return the error of a request for which memory was short. Frees what waits for its next use."""
    memory.give_back()
    return Unavailable("the instance has too little memory left for this request")


def is_shortage(error: BaseException) -> bool:
    """Return whether an error says that memory was short."""
    if isinstance(error, cv2.error):
        return bool(error.code == cv2.Error.StsNoMem)
    # protobuf and onnxruntime have no class for this.
    if isinstance(error, DecodeError):
        return _PROTOBUF_TEXT in str(error)
    from_ort = type(error).__module__.startswith("onnxruntime")
    return isinstance(error, MemoryError) or (from_ort and any(text in str(error) for text in _ORT_TEXTS))
