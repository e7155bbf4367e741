"""Records which requests a worker's threads work on, in shared memory that survives a crash of the worker."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

MAX_THREADS = 256
_MAX_IDS = 1022
_HEAD = struct.Struct("<IId")
_SLOT_BYTES = _HEAD.size + 8 * _MAX_IDS


@dataclass(frozen=True)
class Running:
    """The requests that a thread works on, and since when, in seconds of the monotonic clock."""

    ids: tuple[int, ...]
    since_s: float
    preparing: bool


class Progress:
    """One slot per thread, which only that thread writes."""

    def __init__(self, descriptor: int | None = None) -> None:
        """Make new memory, or map the memory of another process's descriptor."""
        self.descriptor = os.memfd_create("progress", os.MFD_ALLOW_SEALING) if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self.descriptor, MAX_THREADS * _SLOT_BYTES)
            # Without seals the other process could shrink the memory, and crash its readers.
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._memory = mmap.mmap(self.descriptor, MAX_THREADS * _SLOT_BYTES)

    def begin(self, thread: int, ids: Sequence[int], *, preparing: bool) -> None:
        """Record that the thread prepares or runs these requests, or the first of very many."""
        ids = ids[:_MAX_IDS]
        start = thread * _SLOT_BYTES
        struct.pack_into(f"<{len(ids)}Q", self._memory, start + _HEAD.size, *ids)
        _HEAD.pack_into(self._memory, start, len(ids), preparing, time.monotonic())

    def end(self, thread: int) -> None:
        """Record that the thread is idle."""
        _HEAD.pack_into(self._memory, thread * _SLOT_BYTES, 0, 0, 0.0)

    def running(self) -> list[Running]:
        """Return the work of all busy threads."""
        found = []
        for start in range(0, MAX_THREADS * _SLOT_BYTES, _SLOT_BYTES):
            count, preparing, since_s = _HEAD.unpack_from(self._memory, start)
            if 0 < count <= _MAX_IDS:
                ids = struct.unpack_from(f"<{count}Q", self._memory, start + _HEAD.size)
                found.append(Running(ids, since_s, bool(preparing)))
        return found

    def clear(self) -> None:
        """Clear all slots before a new process writes them."""
        for thread in range(MAX_THREADS):
            self.end(thread)

    def close(self) -> None:
        self._memory.close()
        os.close(self.descriptor)
