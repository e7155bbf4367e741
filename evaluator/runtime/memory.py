"""The memory of this process: how much more it may take, and giving back what it no longer uses."""

from __future__ import annotations

import ctypes
import math
from contextlib import suppress
from pathlib import Path

from evaluator.runtime import cpus

_MEMINFO = Path("/proc/meminfo")
# Version 2 and version 1 of cgroups: the limit, and what is used of it.
_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def available_bytes(cgroups: Path = cpus.CGROUPS, own: Path = cpus.OWN, meminfo: Path = _MEMINFO) -> float:
    """Return what the machine has, or what the limits of the process's cgroups leave; infinite if nothing tells."""
    left = [_left(folder) for folder in cpus.folders(cgroups, own, "memory")]
    return min(_field(meminfo, "MemAvailable"), *left, math.inf)


def limit_bytes(cgroups: Path = cpus.CGROUPS, own: Path = cpus.OWN, meminfo: Path = _MEMINFO) -> float:
    """Return the least limit of the process's cgroups; infinite if none is below what the machine has."""
    limits = [_limit(folder) for folder in cpus.folders(cgroups, own, "memory")]
    least = min([*limits, math.inf])
    return least if least < _field(meminfo, "MemTotal") else math.inf


def give_back() -> None:
    """Give freed memory back to the system. The C library keeps it otherwise; one that can't is left alone."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _field(meminfo: Path, name: str) -> float:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return math.inf
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), math.inf)


def _left(folder: Path) -> float:
    return _limit(folder) - _number(folder, 1, 0)


def _limit(folder: Path) -> float:
    return _number(folder, 0, math.inf)


def _number(folder: Path, of: int, default: float) -> float:
    for names in _FILES:
        for place in (folder, folder / "memory"):
            try:
                # "max" is no number: there is no limit.
                return int((place / names[of]).read_text())
            except (OSError, ValueError):
                pass
    return default
