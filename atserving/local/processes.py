"""Keep processes running with asyncio: restart them when they die, and stop them in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator, Sequence
from enum import StrEnum

import structlog

from atserving.local.child import ChildProcess

log = structlog.get_logger()

START_S = 1.0
"""A process that lives for this long counts as started."""
SETTLED_S = 10.0
"""A process that was started again and lives for this long will not die of the same at once."""
STOP_S = 20.0
"""How long a process may take to stop before it is killed."""

_FIRST_RETRY_S = 0.1
_LONGEST_RETRY_S = 5.0


class State(StrEnum):
    """The state of a managed process."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting"
    """It died; a restart is due."""


class ManagedProcess:
    """A process with automatic restarts until it is stopped."""

    def __init__(self, name: str, child: ChildProcess, *, stop_s: float = STOP_S) -> None:
        self.name = name
        self._child = child
        self._stop_s = stop_s
        self._keeper: asyncio.Task[None] | None = None
        self._began_s = 0.0
        self._exits = 0

    @property
    def is_settled(self) -> bool:
        """Whether it runs, and has not died a short time ago."""
        return self._child.is_running and self._lived_s() >= (SETTLED_S if self._exits else START_S)

    @property
    def state(self) -> State:
        if self._keeper is None:
            return State.STOPPED
        if not self._child.is_running:
            return State.WAITING
        return State.RUNNING if self._lived_s() >= START_S else State.STARTING

    @property
    def pid(self) -> int | None:
        """The process id, None while there is no process."""
        return self._child.pid if self._child.is_running else None

    def start(self) -> None:
        """Start the process, and restart it whenever it dies. Raises OSError if the first start fails."""
        if self._keeper is None:
            self._spawn()
            self._keeper = asyncio.create_task(self._keep(), name=f"keep {self.name}")

    async def stop(self, *, kill: bool = False) -> None:
        """Stop the process with SIGTERM, or with SIGKILL when that takes too long or if ``kill``. It stays down."""
        if self._keeper is None:
            return
        keeper, self._keeper = self._keeper, None
        keeper.cancel()
        await asyncio.wait({keeper})
        try:
            if not kill:
                self._child.send(signal.SIGTERM)
                async with asyncio.timeout(self._stop_s):
                    await self._child.ended()
        except TimeoutError:
            log.warning("process killed", process=self.name, reason=f"it did not stop within {self._stop_s:g} s")
        finally:
            self._child.kill_session()
            await self._child.ended()
        if not keeper.cancelled():
            keeper.result()

    def kill(self) -> None:
        """Kill the process with SIGKILL, like a crash. It restarts."""
        self._child.send(signal.SIGKILL)

    def log_text(self) -> str:
        """Return the process's log so far."""
        return self._child.log_text()

    async def watch(self) -> None:
        """Wait until the process is stopped. Raises the defect that ended its supervision, if there was one."""
        if keeper := self._keeper:
            await asyncio.wait({keeper})
            if not keeper.cancelled():
                keeper.result()

    def _lived_s(self) -> float:
        return asyncio.get_running_loop().time() - self._began_s

    def _spawn(self) -> None:
        self._began_s = asyncio.get_running_loop().time()
        self._child.start()

    async def _keep(self) -> None:
        retry_s = _FIRST_RETRY_S
        while True:
            status = await self._child.ended()
            self._exits += 1
            if self._lived_s() >= START_S:
                retry_s = _FIRST_RETRY_S
            log.warning("process exited", process=self.name, status=status)
            await asyncio.sleep(retry_s)
            retry_s = min(retry_s * 2, _LONGEST_RETRY_S)
            try:
                self._spawn()
            except OSError as error:
                log.warning("process start failed", process=self.name, reason=str(error))


class ProcessGroup:
    """Processes that start together and stop stage by stage, the last stage first."""

    def __init__(self, *stages: Sequence[ManagedProcess]) -> None:
        self._stages = stages

    def __iter__(self) -> Iterator[ManagedProcess]:
        for stage in self._stages:
            yield from stage

    def __getitem__(self, name: str) -> ManagedProcess:
        """Return the process with that name. Raises KeyError."""
        for each in self:
            if each.name == name:
                return each
        raise KeyError(name)

    def start(self) -> None:
        """Start every process. Raises OSError."""
        for each in self:
            each.start()

    async def watch(self) -> None:
        """Wait until every process is stopped. Raises the defect that ended the supervision of one."""
        async with asyncio.TaskGroup() as tasks:
            for each in self:
                tasks.create_task(each.watch())

    async def stop(self) -> None:
        """Stop every process. The last stage stops first; the processes of a stage stop together."""
        for stage in reversed(self._stages):
            await asyncio.gather(*(each.stop() for each in stage))
