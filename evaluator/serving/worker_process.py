"""One life of the worker's process, as the evaluator holds it: started, spoken to, killed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import orjson

from atserving.errors import StartError
from atserving.v1 import evaluator_pb2
from evaluator.worker import channel
from evaluator.worker.progress import Progress

_SOCKET_BYTES = 4 << 20
# What a worker that has ended has still said arrives at once; what it started may keep its end of the socket open.
_LAST_WORDS_S = 0.2

Replies = Callable[[evaluator_pb2.ExchangeResponse], None]


class WorkerProcess(asyncio.Protocol):
    """Dead for good once it has died or was killed; ``ended`` is done then."""

    def __init__(self, progress: Progress, replies: Replies) -> None:
        """Starts nothing yet. ``replies`` is called with each frame of them."""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._progress = progress
        self._replies = replies
        self._started: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, once it is started."""
        return self._popen.pid if self._popen else None

    async def start(self, start: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Starts the process with what it is to load; what it says of that. Raises StartError."""
        ours, theirs = socket.socketpair()
        for each in (ours, theirs):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        descriptors = [theirs.fileno(), self._progress.descriptor]
        self._popen = await asyncio.to_thread(
            subprocess.Popen,
            [sys.executable, "-m", "evaluator.worker.main", *map(str, descriptors)],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            # What a script prints must not look like this process's own output.
            stdout=2,
            # Signals of a terminal are not for it, and what it starts can be killed with it.
            start_new_session=True,
        )
        theirs.close()
        loop = asyncio.get_running_loop()
        ours.setblocking(False)
        await loop.create_unix_connection(lambda: self, sock=ours)
        self._pidfd = os.pidfd_open(self._popen.pid)
        loop.add_reader(self._pidfd, self._exited)
        self.send(channel.Kind.START, orjson.dumps(start))
        try:
            async with asyncio.timeout(timeout_s):
                return await self._said()
        except TimeoutError:
            raise StartError(f"net_init did not return within {timeout_s:g} s (model_params.init_timeout_s)") from None

    async def _said(self) -> dict[str, Any]:
        ends: list[asyncio.Future[Any]] = [self._started, self.ended]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not self._started.done():
            raise StartError("the net's process ended while the net was loaded")
        said = self._started.result()
        if error := said.get("error"):
            raise StartError(str(error))
        return said

    def send(self, kind: channel.Kind, *payload: bytes) -> None:
        """Never waits: what is sent is bounded by who sends. The payload may be in parts."""
        if self._transport and not self._transport.is_closing():
            self._transport.writelines([channel.HEAD.pack(kind, sum(map(len, payload))), *payload])

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= channel.HEAD.size:
            kind, length = channel.HEAD.unpack_from(self._buffer, start)
            end = start + channel.HEAD.size + length
            if length > channel.MAX_BYTES_BACK:
                self.kill()
                return
            if len(self._buffer) < end:
                break
            payload = bytes(memoryview(self._buffer)[start + channel.HEAD.size : end])
            start = end
            try:
                self._frame(kind, payload)
            except Exception:
                # A script that writes to the socket itself says what no host would.
                self.kill()
                return
        if start:
            del self._buffer[:start]

    def _frame(self, kind: int, payload: bytes) -> None:
        if kind == channel.Kind.REPLIES:
            self._replies(evaluator_pb2.ExchangeResponse.FromString(payload))
        elif kind == channel.Kind.START and not self._started.done():
            self._started.set_result(dict(orjson.loads(payload)))
        else:
            raise ValueError(f"a frame of kind {kind}")

    def connection_lost(self, _: Exception | None) -> None:
        self.kill()

    def _exited(self) -> None:
        assert self._popen
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._kill_group()
        self._popen.wait()
        loop.call_later(_LAST_WORDS_S, self._end)

    def kill(self) -> None:
        """Ends the process, with all that it started in its group."""
        self._kill_group()
        if self._transport:
            self._transport.abort()
        self._end()

    async def gone(self) -> int | None:
        """Returns once the process, which was killed or has ended, is no more: its status, as subprocess has it."""
        return await asyncio.to_thread(self._popen.wait) if self._popen else None

    def _kill_group(self) -> None:
        # Its id can't be another's before it has been waited for.
        if self._popen and self._popen.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
            if self._transport:
                self._transport.abort()
