"""A process within the memory of its pod. The kernel enforces the limit where a test may make a cgroup."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from reliability import pods
from tests.processes import Process

_CONTROLLER = Path("/sys/fs/cgroup/memory")
# A shell that joins the cgroup, and becomes the command. $0 is the file with the cgroup's processes.
_JOIN = 'echo $$ > "$0" && exec "$@"'
# The kernel's buffers for sockets count in a pod, too.
_SPARE_MIB = 128


class PodMemory:
    """A context manager. A process of :meth:`command` has no more memory than its pod, where ``is_enforced``."""

    def __init__(self, component: str) -> None:
        self.limit_mib = pods.limits()[component] >> 20
        self._folder: Path | None = None

    def __enter__(self) -> PodMemory:
        # Only version 1 has this file.
        if os.access(_CONTROLLER / "memory.limit_in_bytes", os.R_OK) and os.access(_CONTROLLER, os.W_OK):
            self._folder = Path(tempfile.mkdtemp(prefix="atserving-", dir=_CONTROLLER))
            (self._folder / "memory.limit_in_bytes").write_text(str(self.limit_mib << 20))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder:
            self._folder.rmdir()

    @property
    def is_enforced(self) -> bool:
        return self._folder is not None

    def command(self, command: Sequence[str]) -> list[str]:
        """Return a command line that runs ``command`` with the memory of the pod."""
        if self._folder is None:
            return list(command)
        return ["sh", "-c", _JOIN, str(self._folder / "cgroup.procs"), *command]

    def check(self, process: Process) -> None:
        """Check that the process has stayed within the limit since :func:`forget_most`."""
        assert most_mib(process) < self.limit_mib - _SPARE_MIB
        if self._folder:
            assert "oom_kill 0" in (self._folder / "memory.oom_control").read_text()


def most_mib(process: Process) -> int:
    """Return the most memory that a process has had since :func:`forget_most`, in MiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert found
    return int(found[1]) >> 10


def forget_most(process: Process) -> None:
    """Start :func:`most_mib` anew."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
