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
    return min(_free(meminfo), *left, math.inf)


def give_back() -> None:
    """Give freed memory back to the system. The C library keeps it otherwise; one that can't is left alone."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _free(meminfo: Path) -> float:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return math.inf
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf)


def _left(folder: Path) -> float:
    for limit, used in _FILES:
        for place in (folder, folder / "memory"):
            try:
                # "max" is no number: there is no limit.
                return int((place / limit).read_text()) - int((place / used).read_text())
            except (OSError, ValueError):
                pass
    return math.inf
