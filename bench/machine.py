"""What processes use: CPU time, switches between threads, memory; and the CPU time of everything else here."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from atserving.local import proc
from atserving.local.mesh import Mesh

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
BUSY_CORES = 0.1
"""A measurement is disturbed if other processes used more than this."""


@dataclass(frozen=True)
class Usage:
    """What a group of processes has used so far."""

    cpu_s: float
    waits: int = 0
    """How often their threads have given up a CPU: voluntary context switches."""
    preemptions: int = 0
    """How often their threads had to leave a CPU: involuntary context switches."""

    def since(self, earlier: Usage) -> Usage:
        """Return what was used since an earlier moment."""
        return Usage(self.cpu_s - earlier.cpu_s, self.waits - earlier.waits, self.preemptions - earlier.preemptions)


def usage(groups: Mapping[str, Iterable[int]]) -> dict[str, Usage]:
    """Return what each group of processes has used so far, by its name."""
    return {
        name: Usage(
            sum(map(_cpu_s, pids)), _switches(pids, "voluntary_ctxt_switches"), _switches(pids, "nonvoluntary_ctxt")
        )
        for name, pids in ((name, tuple(each)) for name, each in groups.items())
    }


def mesh_processes(mesh: Mesh) -> dict[str, list[int]]:
    """Return the process ids of a mesh by name. The worker of an evaluator is apart from its front."""
    groups: dict[str, list[int]] = {}
    for name, pid in mesh.pids().items():
        groups[name] = [pid]
        if workers := [each.pid for each in proc.descendants(pid)]:
            groups[f"{name} worker"] = workers
    return groups


def tree(pid: int) -> list[int]:
    """Return a process and its living descendants."""
    return [pid, *(each.pid for each in proc.descendants(pid))]


def memory_mb(pids: Iterable[int]) -> float:
    """Return the memory of processes in MB; a page that several share counts in parts (PSS)."""
    lines = [
        line.split()
        for pid in pids
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        if line.startswith("Pss:")
    ]
    return sum(int(line[1]) for line in lines) / 1024


def _cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process so far, to the microsecond; /proc counts hundredths of a second."""
    # The clock of a process, see clock_getcpuclockid(3). Raises OSError if there is no such process.
    return time.clock_gettime((~pid << 3) | 2)


def _switches(pids: Iterable[int], name: str) -> int:
    """Return the sum of a field of /proc/<pid>/status over all threads."""
    count = 0
    for path in (path for pid in pids for path in Path(f"/proc/{pid}/task").glob("*/status")):
        # A thread may end between the listing and the reading.
        with suppress(FileNotFoundError, ProcessLookupError):
            count += sum(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(name))
    return count


@dataclass(frozen=True)
class Moment:
    """A point in time: the wall clock, the CPU seconds of this machine, and those of this process and its children."""

    wall_s: float
    machine_s: float
    own_s: float

    @staticmethod
    def now() -> Moment:
        own = os.times()
        own_s = time.process_time() + own.children_user + own.children_system
        for each in proc.descendants(os.getpid()):
            # It may end between the listing and the reading.
            with suppress(OSError):
                own_s += _cpu_s(each.pid)
        return Moment(time.monotonic(), _machine_s(), own_s)

    def others_since(self, earlier: Moment) -> float:
        """Return how many cores processes outside of the benchmark used, on average, since an earlier moment."""
        others_s = (self.machine_s - earlier.machine_s) - (self.own_s - earlier.own_s)
        return round(max(others_s, 0) / (self.wall_s - earlier.wall_s), 2)


def _machine_s() -> float:
    # user, nice, system, idle, iowait, irq, softirq, steal: proc(5). What the host took away counts as others' too.
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) * _TICK_S
