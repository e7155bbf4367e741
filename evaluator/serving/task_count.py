"""Counts the processes and threads of a worker, so that a script can't fill the machine with them.

The kernel has no limit for this that fits: RLIMIT_NPROC counts all processes of a user, on the whole node, and none of
root; a cgroup takes rights that a container does not have.
"""

from __future__ import annotations

import sys
from pathlib import Path

_PROC = Path("/proc")


class TaskCount:
    """Counts a process group once the machine has so many more processes and threads that it may have too many."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._least = sys.maxsize
        """The fewest that the machine had since the last count."""
        self._room = -1
        """How many the group could still make then; at first it has to be counted."""

    def is_over(self, group: int) -> bool:
        """Return whether the group has more than the most. Nearly always this reads one line of /proc."""
        now = _all_tasks()
        self._least = min(self._least, now)
        if now - self._least <= self._room:
            return False
        count = _tasks(group)
        self._least, self._room = now, self._most - count
        return count > self._most


def _all_tasks() -> int:
    """Return how many processes and threads the machine has."""
    return int((_PROC / "loadavg").read_text().split()[3].partition("/")[2])


def _tasks(group: int) -> int:
    tasks = 0
    for stat in _PROC.glob("[0-9]*/stat"):
        try:
            # After the name of the process, which may hold anything: state, parent, group.
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        # A process that is dead and not waited for has a place, too.
        if int(fields[2]) == group:
            tasks += int(fields[17]) or 1
    return tasks
