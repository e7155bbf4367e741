"""Which requests a worker's threads are at, in memory that outlives the worker: who finds it dead can tell why."""

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
    """What a thread is at: the requests, and since when, of the monotonic clock."""

    ids: tuple[int, ...]
    since_s: float
    preparing: bool


class Progress:
    """A slot for each thread, written by that thread alone."""

    def __init__(self, descriptor: int | None = None) -> None:
        """New memory, or that of a descriptor that came from another process."""
        self.descriptor = os.memfd_create("progress", os.MFD_ALLOW_SEALING) if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self.descriptor, MAX_THREADS * _SLOT_BYTES)
            # Memory that the other process could cut off would end whoever reads it.
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._memory = mmap.mmap(self.descriptor, MAX_THREADS * _SLOT_BYTES)

    def begin(self, thread: int, ids: Sequence[int], *, preparing: bool) -> None:
        """The thread is at these requests (of very many, at the first): it prepares or runs them."""
        ids = ids[:_MAX_IDS]
        start = thread * _SLOT_BYTES
        struct.pack_into(f"<{len(ids)}Q", self._memory, start + _HEAD.size, *ids)
        _HEAD.pack_into(self._memory, start, len(ids), preparing, time.monotonic())

    def end(self, thread: int) -> None:
        """The thread is at nothing."""
        _HEAD.pack_into(self._memory, thread * _SLOT_BYTES, 0, 0, 0.0)

    def running(self) -> list[Running]:
        """What all threads are at."""
        found = []
        for start in range(0, MAX_THREADS * _SLOT_BYTES, _SLOT_BYTES):
            count, preparing, since_s = _HEAD.unpack_from(self._memory, start)
            if 0 < count <= _MAX_IDS:
                ids = struct.unpack_from(f"<{count}Q", self._memory, start + _HEAD.size)
                found.append(Running(ids, since_s, bool(preparing)))
        return found

    def clear(self) -> None:
        """Before another process writes here."""
        for thread in range(MAX_THREADS):
            self.end(thread)

    def close(self) -> None:
        self._memory.close()
        os.close(self.descriptor)
