"""Processes may run at the memory limits of their pods."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from reliability import pods

# Allocates more than any pod may have.
HUNGRY = "b'x' * (16 << 30)"


def test_the_limits_are_those_of_the_manifests() -> None:
    assert {kind: size >> 20 > 100 for kind, size in pods.limits().items()} == {"envoy": True, "gate": True}


@pytest.mark.skipif(not os.access("/sys/fs/cgroup/memory", os.W_OK), reason="no writable cgroups of version 1")
def test_the_kernel_kills_a_process_over_its_limit() -> None:
    with pods.Pods() as limited:
        command = limited.command("gate-0", "gate", [sys.executable, "-c", HUNGRY])
        hungry = subprocess.run(command, capture_output=True, check=False)
        free = limited.command("etcd-0", "etcd", [sys.executable, "-c", "print()"])
    assert hungry.returncode == -9
    assert free == [sys.executable, "-c", "print()"]
