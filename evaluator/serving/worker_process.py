"""One worker process, as the front sees it: start, frames, end."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import orjson
import structlog

from atserving import link
from atserving.errors import StartError
from atserving.frame_protocol import FrameProtocol
from evaluator.sandbox.decision import Sandbox
from evaluator.serving import start_reply
from evaluator.serving.start_reply import StartReply
from evaluator.serving.task_count import TaskCount
from evaluator.serving.worker_output import WorkerOutput
from evaluator.worker.progress import Progress

log = structlog.get_logger()

_SOCKET_BYTES = 4 << 20
_COUNT_S = 0.1
# The last frames of an ended worker arrive at once; its children may keep its end of the socket open.
_LAST_FRAMES_S = 0.2

Replied = Callable[[link.Reply], None]
Timed = Callable[[link.Buffer, int, int], None]


class WorkerProcess(FrameProtocol):
    """A worker process. ``ended`` is done once the process has ended; it never restarts."""

    def __init__(
        self, progress: Progress, replied: Replied, timed: Timed, writable: Callable[[], None], sandbox: Sandbox
    ) -> None:
        """Start nothing yet.

        ``replied`` is called with each reply, ``timed`` with the times of those to follow, if the process tells them,
        ``writable`` when the process reads again.
        """
        super().__init__()
        self._sandbox = sandbox
        self._count = TaskCount(sandbox.processes)
        self._counting: asyncio.TimerHandle | None = None
        self._killed_for = ""
        self._output: WorkerOutput | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._progress = progress
        self._replied = replied
        self._timed = timed
        self._writable = writable
        self._started: asyncio.Future[StartReply] = asyncio.get_running_loop().create_future()
        self._popen: subprocess.Popen[bytes] | None = None
        self._tether: tuple[int, ...] = ()

    @property
    def pid(self) -> int | None:
        """The process's id; None before its start."""
        return self._popen.pid if self._popen else None

    @property
    def partial_bytes(self) -> int:
        """How much of an incomplete frame has arrived."""
        return self.reader.partial_bytes

    async def start(self, start: dict[str, Any], timeout_s: float) -> StartReply:
        """Start the process with the frame ``start``, and return its start reply. Raises StartError."""
        ours, theirs = socket.socketpair()
        for each in (ours, theirs):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        self._output = WorkerOutput()
        try:
            await asyncio.to_thread(self._spawn, [theirs.fileno(), self._progress.descriptor], self._output.end)
        finally:
            theirs.close()
            os.close(self._output.end)
        assert self._popen
        self._output.follow()
        loop = asyncio.get_running_loop()
        ours.setblocking(False)
        await loop.create_unix_connection(lambda: self, sock=ours)
        self._pidfd = os.pidfd_open(self._popen.pid)
        loop.add_reader(self._pidfd, self._exited)
        if self._sandbox.processes:
            self._count_tasks()
        self.write([link.frame(link.START, orjson.dumps(start))])
        try:
            async with asyncio.timeout(timeout_s):
                return await self._said()
        except TimeoutError:
            raise StartError(f"net_init did not return within {timeout_s:g} s (model_params.init_timeout_s)") from None

    def _spawn(self, descriptors: list[int], output: int) -> None:
        policy = os.memfd_create("policy")
        try:
            os.write(policy, orjson.dumps(self._sandbox.policy))
            os.lseek(policy, 0, os.SEEK_SET)
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "evaluator.worker", *map(str, descriptors)],
                pass_fds=descriptors,
                stdin=policy,
                env=self._sandbox.environment,
                stdout=output,
                stderr=output,
                # A session of its own keeps the terminal's signals away, and lets one signal kill its children too.
                start_new_session=True,
            )
            self._tether = _tether(self._popen.pid)
        finally:
            os.close(policy)

    def _count_tasks(self) -> None:
        """End the process if it has too many processes and threads. Repeat this until it has ended."""
        if self._popen is None or self.ended.done():
            return
        if self._count.is_over(self._popen.pid):
            self._kill_for(f"it has more than {self._sandbox.processes} processes and threads")
            return
        self._counting = asyncio.get_running_loop().call_later(_COUNT_S, self._count_tasks)

    async def _said(self) -> StartReply:
        ends: list[asyncio.Future[Any]] = [self._started, self.ended]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not self._started.done():
            why = f": {self._killed_for}" if self._killed_for else ""
            raise StartError(f"the net's process ended while the net was loaded{why}")
        said = self._started.result()
        if said.error:
            raise StartError(said.error)
        return said

    def write(self, parts: list[link.Buffer]) -> None:
        """Send frames in parts, without waiting: the callers bound what they send."""
        if self.transport and not self.transport.is_closing():
            self.transport.writelines(parts)

    def frame_received(self, kind: int, data: link.Buffer, start: int, end: int) -> None:
        if kind == link.REPLY:
            self._replied(link.read_reply(data, start, end))
        elif kind == link.TIMES:
            self._timed(data, start, end)
        elif kind == link.START and not self._started.done():
            self._started.set_result(start_reply.read(data[start:end]))
        else:
            raise link.Malformed(f"a frame of kind {kind}")

    def resume_writing(self) -> None:
        self.writable = True
        self._writable()

    def malformed(self, reason: str) -> None:
        # A script wrote to the socket itself.
        self._kill_for(f"it broke the protocol: {reason}")

    def connection_lost(self, _: Exception | None) -> None:
        self.kill()

    def _exited(self) -> None:
        assert self._popen
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._kill_group()
        self._popen.wait()
        loop.call_later(_LAST_FRAMES_S, self._end)

    def _kill_for(self, reason: str) -> None:
        self._killed_for = reason
        log.error("worker killed", reason=reason)
        self.kill()

    def kill(self) -> None:
        """Kill the process and its group."""
        self._kill_group()
        if self.transport:
            self.transport.abort()
        self._end()

    async def gone(self) -> int | None:
        """Wait for the end of a process that was killed or ends itself; return its status as subprocess does."""
        return await asyncio.to_thread(self._wait, self._popen) if self._popen else None

    @staticmethod
    def _wait(popen: subprocess.Popen[bytes]) -> int:
        status = popen.wait()
        # The first process of a container is left with the children of a script whose parents have died.
        with suppress(ChildProcessError):
            while True:
                os.waitpid(-popen.pid, 0)
        return status

    def _kill_group(self) -> None:
        # Nobody else gets its id before it is waited for.
        if self._popen and self._popen.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)
        for end in self._tether:
            os.close(end)
        self._tether = ()

    def _end(self) -> None:
        if self._output:
            self._output.close()
        if self._counting:
            self._counting.cancel()
        if not self.ended.done():
            self.ended.set_result(None)
            if self.transport:
                self.transport.abort()


def _tether(group: int) -> tuple[int, int]:
    """Return the ends of a pipe; once one is closed before the other, the kernel kills a process group.

    Both are this process's alone, so its death closes them, one after the other. The group dies even if the worker is
    stopped, or if a script holds the GIL. A script has neither end: it could take the signal off it.
    """
    ends = os.pipe()
    # It is the kernel's choice which it closes first.
    for end in ends:
        fcntl.fcntl(end, fcntl.F_SETOWN, -group)
        fcntl.fcntl(end, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(end, fcntl.F_SETFL, fcntl.fcntl(end, fcntl.F_GETFL) | os.O_ASYNC)
    return ends
