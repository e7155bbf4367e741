"""A child process in a session of its own, with a log file, that never outlives its parent."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from atserving.local import proc

# The shell runs after setpriv has asked for the signal. If the parent died before that, the shell has another parent.
_GUARD = '[ "$PPID" = "$0" ] && exec "$@"'


def bound_to_parent(command: Sequence[str]) -> list[str]:
    """Return a command line that runs ``command`` and that the kernel kills when the calling process dies.

    The kernel kills it as soon as the *thread* that started it ends: start it from a thread that lives on, such as the
    main thread. setpriv and sh replace themselves with ``command``, so that they cost no process. A function that
    subprocess runs between fork and exec could ask for the same, but it is not safe in a process with threads.
    """
    return ["setpriv", "--pdeathsig", "KILL", "sh", "-c", _GUARD, str(os.getpid()), *command]


class ChildProcess:
    """A process that can be started, signalled and waited for, again and again. Its output goes to ``log``.

    Whenever it ends, all that it has started in its session is killed. Use one object from one thread at a time.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """``environment`` is added to that of this process."""
        self.command = list(command)
        self.log = log
        self._cwd = cwd
        self._environment = environment or {}
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Whether it was started and its end was not awaited yet."""
        return self._popen is not None and self._popen.returncode is None

    @property
    def pid(self) -> int:
        """The process id of the last start."""
        assert self._popen, "the process was never started"
        return self._popen.pid

    def start(self) -> None:
        """Start the process. Raises OSError."""
        assert not self.is_running
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                bound_to_parent(self.command),
                cwd=self._cwd,
                env={**os.environ, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A terminal's ctrl-C goes to the parent only, which then stops its processes in order.
                start_new_session=True,
            )

    def send(self, number: int) -> None:
        """Send a signal to the process, without effect if it has ended."""
        if self.is_running:
            os.kill(self.pid, number)

    def kill_session(self) -> None:
        """Kill the process and all that it has started in its session, without waiting for their end."""
        if not self.is_running:
            return
        killed: set[int] = set()
        # Again until nothing is new: a process may have forked just before it was killed.
        while living := {each.pid for each in self._session() if each.is_alive} - killed:
            for pid in living:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            killed |= living

    def _session(self) -> list[proc.ProcessStat]:
        return [each for each in proc.every_process() if each.session == self.pid]

    def wait(self, timeout_s: float | None = None) -> int:
        """Block until the process has ended; return its exit status as subprocess does. Raises TimeoutError."""
        if self.is_running:
            descriptor = os.pidfd_open(self.pid)
            try:
                poll = select.poll()
                poll.register(descriptor, select.POLLIN)
                if not poll.poll(None if timeout_s is None else timeout_s * 1000):
                    raise TimeoutError(f"{self.command[0]} did not end within {timeout_s} s")
            finally:
                os.close(descriptor)
        return self._reap()

    async def ended(self) -> int:
        """Wait until the process has ended; return its exit status as subprocess does."""
        if self.is_running:
            descriptor = os.pidfd_open(self.pid)
            loop = asyncio.get_running_loop()
            ready = asyncio.Event()
            loop.add_reader(descriptor, ready.set)
            try:
                await ready.wait()
            finally:
                loop.remove_reader(descriptor)
                os.close(descriptor)
        return self._reap()

    def _reap(self) -> int:
        assert self._popen, "the process was never started"
        # Until its exit status is read, its process id and so its session id cannot become another's.
        self.kill_session()
        return self._popen.wait()

    def log_text(self) -> str:
        """Return all that it has logged so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""
