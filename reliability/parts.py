"""A process of the mesh that can be killed, stopped and frozen."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from atserving.local import proc
from atserving.local.child import ChildProcess
from atserving.local.processes import ManagedProcess, State

_STOP_S = 45.0


class Part:
    """One process. It is started again when it dies, as Kubernetes does it."""

    def __init__(self, name: str, kind: str, command: Sequence[str], folder: Path) -> None:
        """``folder`` gets the log, and is the process's working directory."""
        self.name = name
        self.kind = kind
        """``envoy``, ``gate``, ``registry``, ``etcd``, ``front`` (an evaluator), or ``files``."""
        self._child = ChildProcess(command, folder / f"{name}.log", cwd=folder)
        self._managed = ManagedProcess(name, self._child, stop_s=_STOP_S)

    @property
    def pid(self) -> int | None:
        return self._managed.pid

    @property
    def runs(self) -> bool:
        """Whether it has run for a second at least."""
        return self._managed.state is State.RUNNING

    @property
    def worker_pid(self) -> int | None:
        """The process id of an evaluator's worker."""
        return next((each.pid for each in proc.descendants(self.pid) if each.is_alive), None) if self.pid else None

    def start(self) -> None:
        self._managed.start()

    async def stop(self) -> None:
        """Stop it with SIGTERM. It stays down."""
        await self._managed.stop()

    async def end(self) -> None:
        """Kill it. It stays down."""
        await self._managed.stop(kill=True)

    def kill(self) -> None:
        """Kill it. It is started again."""
        self._managed.kill()

    def freeze(self) -> None:
        self._child.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self._child.send(signal.SIGCONT)

    def signal_worker(self, number: int) -> None:
        """Send a signal to an evaluator's worker."""
        if pid := self.worker_pid:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def log(self) -> str:
        """Return all that it has logged so far."""
        return self._child.log_text()
