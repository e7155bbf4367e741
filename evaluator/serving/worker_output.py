"""What a worker writes to standard output and standard error, as lines on the standard error of this process.

A worker has a pipe and not the file itself: it could truncate that, or be stopped by the limit of its own files.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

from atserving.telemetry import write_worker_lines

_READ_BYTES = 1 << 16
# After each read: a script that prints without end waits, and neither fills a disk soon nor keeps this process busy.
_PAUSE_S = 0.02
_LAST_BYTES = 1 << 20


class WorkerOutput:
    """A pipe, and the lines that come out of it."""

    def __init__(self) -> None:
        self._read, self.end = os.pipe()
        """``end`` is what the worker writes to; close it once the worker has it."""
        os.set_blocking(self._read, False)
        self._rest = b""
        self._closed = False
        self._resuming: asyncio.TimerHandle | None = None

    def follow(self) -> None:
        """Copy lines from now on."""
        self._resuming = None
        asyncio.get_running_loop().add_reader(self._read, self._copy)

    def close(self) -> None:
        """Copy the last lines, and close the pipe. Without effect the second time."""
        if self._closed:
            return
        self._closed = True
        if self._resuming:
            self._resuming.cancel()
        asyncio.get_running_loop().remove_reader(self._read)
        with suppress(BlockingIOError):
            left = _LAST_BYTES
            while left > 0 and (data := os.read(self._read, _READ_BYTES)):
                left -= len(data)
                self._take(data)
        os.close(self._read)
        if self._rest:
            write_worker_lines(self._rest + b"\n")

    def _copy(self) -> None:
        loop = asyncio.get_running_loop()
        data = os.read(self._read, _READ_BYTES)
        self._take(data)
        loop.remove_reader(self._read)
        if data:
            self._resuming = loop.call_later(_PAUSE_S, self.follow)

    def _take(self, data: bytes) -> None:
        """Write the whole lines: other lines of this process must not come into one."""
        lines, newline, rest = data.rpartition(b"\n")
        if newline:
            write_worker_lines(self._rest + lines + newline)
            self._rest = rest
        else:
            self._rest += rest
        if len(self._rest) >= _READ_BYTES:
            write_worker_lines(self._rest + b"\n")
            self._rest = b""
