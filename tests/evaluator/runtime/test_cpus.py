"""The number of CPUs follows the quotas of the container, not the size of the machine."""

import os
from pathlib import Path

import pytest

from evaluator.runtime import cpus


@pytest.fixture(autouse=True)
def _eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.parametrize(
    ("quota", "count"),
    [
        ("max 100000", 8),
        ("150000 100000", 2),
        ("400000 100000", 4),
        ("5000 100000", 1),
        ("3200000 100000", 8),
        ("?", 8),
    ],
)
def test_quota_of_a_cgroup_limits_the_cpus(quota: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert cpus.available(tmp_path, tmp_path / "none") == count


@pytest.mark.parametrize(("quota_us", "count"), [("-1", 8), ("250000", 3)])
def test_quota_of_a_version_1_cgroup_limits_the_cpus(quota_us: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota_us)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert cpus.available(tmp_path, tmp_path / "none") == count


def test_affinity_limits_the_cpus_without_a_cgroup(tmp_path: Path) -> None:
    assert cpus.available(tmp_path, tmp_path / "none") == 8


@pytest.mark.parametrize(
    ("own", "quotas", "count"),
    [
        ("0::/a/b\n", {"a": "300000 100000"}, 3),
        ("0::/a/b\n", {"a": "600000 100000", "a/b": "200000 100000"}, 2),
        ("0::/elsewhere\n", {"a": "100000 100000"}, 8),
        ("0::/../outside\n", {"a": "100000 100000"}, 8),
    ],
)
def test_smallest_quota_of_the_own_cgroup_and_its_parents_limits_the_cpus(
    own: str, quotas: dict[str, str], count: int, tmp_path: Path
) -> None:
    (tmp_path / "own").write_text("12:memory:/a\n" + own)
    for folder, quota in quotas.items():
        (tmp_path / "cgroup" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / folder / "cpu.max").write_text(quota)
    assert cpus.available(tmp_path / "cgroup", tmp_path / "own") == count


def test_quota_of_the_own_version_1_cgroup_limits_the_cpus(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("4:cpu,cpuacct:/service\n")
    folder = tmp_path / "cpu" / "service"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("200000")
    (folder / "cpu.cfs_period_us").write_text("100000")
    assert cpus.available(tmp_path, tmp_path / "own") == 2
