"""The memory and the load of the GPU that an instance uses, read from the driver by NVIDIA's library for it, NVML."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import structlog

log = structlog.get_logger()

# A scrape waits no longer. A driver that has lost its GPU may never answer.
_MOST_S = 1.0


@dataclass(frozen=True)
class GpuState:
    """The state of a GPU, or of a part of one (MIG)."""

    gpu: str
    """The name that NVIDIA's tools have for it: ``GPU-`` or ``MIG-``, and a UUID."""
    used_bytes: int
    total_bytes: int
    utilisation: float | None
    """The share of the last moment in which it was at work; None for a part of a GPU."""


def read(id_: str) -> GpuState:
    """Return the state of a GPU by its UUID, which the driver of CUDA tells. Blocks. Raises whatever NVML does."""
    # Import it here: instances on a CPU have no use for it, and need not have it.
    import pynvml

    # Once more costs nothing.
    pynvml.nvmlInit()
    try:
        gpu = f"GPU-{id_}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu)
    except pynvml.NVMLError_NotFound:
        gpu = f"MIG-{id_}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        utilisation = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    except pynvml.NVMLError_NotSupported:
        utilisation = None
    return GpuState(gpu, int(memory.used), int(memory.total), utilisation)


class GpuReader:
    """Reads the state of a GPU in a thread, one at a time; a read that never ends holds up no scrape and no stop."""

    def __init__(self, id_: str, read: Callable[[str], GpuState] = read) -> None:
        """``id_`` is the UUID of the GPU, as the worker has told it."""
        self._id = id_
        self._read = read
        self._reading: asyncio.Future[GpuState | Exception] | None = None

    async def state(self) -> GpuState | None:
        """Return the state; None, with a line in the log, if the driver does not tell it."""
        if self._reading is None:
            self._reading = asyncio.get_running_loop().create_future()
            threading.Thread(target=self._run, args=(self._reading,), daemon=True, name="gpu").start()
        reading = self._reading
        if not (await asyncio.wait([reading], timeout=_MOST_S))[0]:
            log.debug("gpu unread", reason=f"the driver has not answered within {_MOST_S:g} s")
            return None
        if self._reading is reading:
            self._reading = None
        found = reading.result()
        if isinstance(found, Exception):
            log.debug("gpu unread", reason=str(found))
            return None
        return found

    def _run(self, reading: asyncio.Future[GpuState | Exception]) -> None:
        found: GpuState | Exception
        try:
            found = self._read(self._id)
        except Exception as error:
            found = error
        # The loop may have ended meanwhile.
        with suppress(RuntimeError):
            reading.get_loop().call_soon_threadsafe(reading.set_result, found)


def checked(id_: object) -> str:
    """Return the UUID of a GPU that a worker has told; empty if it is none."""
    try:
        return str(uuid.UUID(str(id_))) if id_ else ""
    except ValueError:
        return ""
