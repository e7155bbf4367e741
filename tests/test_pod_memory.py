"""The kernel gives a process of a test no more memory than its pod has."""

from __future__ import annotations

import signal
import sys

import pytest

from tests.pod_memory import PodMemory
from tests.processes import Process


def test_a_process_that_takes_more_than_its_pod_has_is_killed() -> None:
    with PodMemory("gate") as memory:
        if not memory.is_enforced:
            pytest.skip("tests cannot make a cgroup here: /sys/fs/cgroup/memory is not writable, or not of version 1")
        greedy = Process(memory.command([sys.executable, "-c", f"bytearray({memory.limit_mib + 64} << 20)"]))
        greedy.start()
        assert greedy.wait() == -signal.SIGKILL
