"""Read the kernel's table of processes, ``/proc``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class ProcessStat:
    """One process as ``/proc/<pid>/stat`` describes it."""

    pid: int
    parent: int
    session: int
    state: str
    """One letter: ``R`` running, ``S`` sleeping, ``T`` stopped, ``Z`` zombie, ..."""
    cpu_s: float
    """User and system time so far, without that of its children."""

    @property
    def is_alive(self) -> bool:
        """Whether it still runs code: a zombie only waits for its parent to read its exit status."""
        return self.state not in "ZX"


def every_process() -> Iterator[ProcessStat]:
    """Yield the processes of this machine that this process may see."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        # A process may end between the listing and the reading.
        with suppress(FileNotFoundError, ProcessLookupError):
            yield _parse(path.read_text())


def descendants(pid: int) -> list[ProcessStat]:
    """Return the children of a process, their children, and so on."""
    children: dict[int, list[ProcessStat]] = {}
    for each in every_process():
        children.setdefault(each.parent, []).append(each)
    found = list(children.get(pid, []))
    for each in found:
        found += children.get(each.pid, [])
    return found


def is_alive(pid: int) -> bool:
    """Whether there is such a process and it still runs code."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return _read(pid).is_alive
    return False


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process. Raises FileNotFoundError if there is no such process."""
    return _read(pid).cpu_s


def _read(pid: int) -> ProcessStat:
    return _parse(Path(f"/proc/{pid}/stat").read_text())


def _parse(text: str) -> ProcessStat:
    # The name, in parentheses, may itself have blanks and parentheses.
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    ticks = int(fields[11]) + int(fields[12])
    return ProcessStat(int(head.split()[0]), int(fields[1]), int(fields[3]), fields[0], ticks * _TICK_S)
