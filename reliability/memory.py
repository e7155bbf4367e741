"""The most memory that each kind of process has, and which processes had to start anew."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from atserving.local import proc
from reliability.parts import Part

_EVERY_S = 0.5
_PEAK = re.compile(r"VmHWM:\s+(\d+) kB")


def _forget(pid: int) -> None:
    """Let a process's peak begin anew. Raises OSError."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


class Peaks:
    """Samples the mesh from its entry to its exit. Worker processes are a kind of their own."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts
        self._most_kib: dict[str, int] = {}
        self._pids: dict[str, set[int]] = {}

    async def __aenter__(self) -> Peaks:
        for pid, _, _ in self._processes():
            with suppress(OSError):
                _forget(pid)
        self._task = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        self._read()

    def mib(self) -> Mapping[str, int]:
        """Return the largest peak of a process of each kind, in MiB."""
        return {kind: kib >> 10 for kind, kib in self._most_kib.items()}

    def restarts(self) -> Mapping[str, int]:
        """Return how often each process was started anew, by its name; the others are left out."""
        return {name: len(pids) - 1 for name, pids in self._pids.items() if len(pids) > 1}

    async def _sample(self) -> None:
        while True:
            self._read()
            await asyncio.sleep(_EVERY_S)

    def _read(self) -> None:
        for pid, kind, name in self._processes():
            # It may end between the listing and the reading.
            with suppress(OSError):
                if found := _PEAK.search(Path(f"/proc/{pid}/status").read_text()):
                    self._most_kib[kind] = max(self._most_kib.get(kind, 0), int(found[1]))
                    self._pids.setdefault(name, set()).add(pid)

    def _processes(self) -> list[tuple[int, str, str]]:
        """Return the process id, the kind and the name of each process."""
        children: dict[int, list[int]] = {}
        for each in proc.every_process():
            children.setdefault(each.parent, []).append(each.pid)
        found = []
        for part in list(self._parts.values()):
            if pid := part.pid:
                found.append((pid, part.kind, part.name))
                if part.kind == "front":
                    found += [(child, "worker", f"worker of {part.name}") for child in children.get(pid, [])]
        return found
