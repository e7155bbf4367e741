"""How many CPUs this process may use: its affinity, less what its cgroup grants."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available(cgroup: Path = _CGROUP) -> int:
    """At least 1. A container's quota of 1.5 CPUs counts as 2."""
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), _quota(cgroup))))


def _quota(cgroup: Path) -> float:
    try:  # cgroup v2: "max 100000" or "150000 100000", microseconds
        quota, period = (cgroup / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:  # cgroup v1; -1: no quota
        quota_us = int((cgroup / "cpu/cpu.cfs_quota_us").read_text())
        return quota_us / int((cgroup / "cpu/cpu.cfs_period_us").read_text()) if quota_us > 0 else math.inf
    except (OSError, ValueError):
        return math.inf
