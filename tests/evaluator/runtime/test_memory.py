"""The available memory is the least that the machine and the cgroups leave; freed memory goes back to the system."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from evaluator.runtime import memory

NONE = Path("/nonexistent")


def test_the_machine_limits_the_memory(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16000 kB\nMemFree:          10 kB\nMemAvailable:     3000 kB\n")
    assert memory.available_bytes(NONE, NONE, meminfo) == 3000 * 1024
    assert memory.available_bytes(NONE, NONE, NONE) == math.inf
    assert 0 < memory.available_bytes() < math.inf


@pytest.mark.parametrize(
    ("limit", "used", "place"),
    [
        ("memory.max", "memory.current", "."),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "."),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory"),
    ],
)
def test_a_cgroup_limits_the_memory(limit: str, used: str, place: str, tmp_path: Path) -> None:
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    (folder / limit).write_text("5000\n")
    (folder / used).write_text("2000\n")
    assert memory.available_bytes(tmp_path, NONE, NONE) == 3000
    (folder / limit).write_text("max\n")
    assert memory.available_bytes(tmp_path, NONE, NONE) == math.inf


def test_a_cgroup_above_the_own_limits_the_memory(tmp_path: Path) -> None:
    own, cgroups = tmp_path / "own", tmp_path / "cgroup"
    own.write_text("0::/pod/container\n")
    for folder, limit in (("pod", "7000"), ("pod/container", "max")):
        (cgroups / folder).mkdir(parents=True)
        (cgroups / folder / "memory.max").write_text(limit)
        (cgroups / folder / "memory.current").write_text("1000")
    assert memory.available_bytes(cgroups, own, NONE) == 6000


def test_freed_memory_is_given_back() -> None:
    memory.give_back()
