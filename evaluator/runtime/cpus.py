"""How many CPUs this process may use: the smallest of its affinity and the quotas of its cgroups."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def available(cgroups: Path = CGROUPS, own: Path = OWN) -> int:
    """Return the number of CPUs, at least 1. A quota of 1.5 CPUs counts as 2."""
    quotas = [_quota(folder) for folder in folders(cgroups, own, "cpu")]
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), *quotas, math.inf)))


def folders(cgroups: Path, own: Path, controller: str) -> Iterator[Path]:
    """Yield the process's own cgroup and all cgroups above it: each may have a limit. A container sees only the root.

    ``controller`` names the hierarchy in version 1 of cgroups, ``cpu`` or ``memory``.
    """
    yield cgroups
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        # "0::/path" of version 2, "4:cpu,cpuacct:/path" of version 1.
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            folder = (cgroups / controller if controllers else cgroups) / path.lstrip("/")
            yield from (each for each in (folder, *folder.parents) if each.is_relative_to(cgroups))


def _quota(folder: Path) -> float:
    try:  # cgroup v2: "max 100000" or "150000 100000", microseconds
        quota, period = (folder / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    for cpu in (folder, folder / "cpu"):
        try:  # cgroup v1; -1: no quota
            quota_us = int((cpu / "cpu.cfs_quota_us").read_text())
            return quota_us / int((cpu / "cpu.cfs_period_us").read_text()) if quota_us > 0 else math.inf
        except (OSError, ValueError):
            pass
    return math.inf
