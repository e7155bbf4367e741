"""Writes lines in a thread of its own, so that a reader who reads nothing, or a slow disk, stops no other thread."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress

MOST_BYTES = 4 << 20
"""The most bytes of lines that wait. Lines above it are dropped and counted."""

# Between two writes: many lines leave in one, and the thread wakes at most so often. Each time costs as much as some
# lines, so a shorter pause would cost slow traffic.
_PAUSE_S = 0.05
_CHUNK_BYTES = 1 << 16
_RETRY_S = 1.0
_BLOCKED_MS = 1000
# At the end of the process, without any progress.
_END_S = 5.0

Write = Callable[[memoryview], int]
"""Writes some bytes, and returns how many. Raises OSError."""


class LogWriter:
    """A queue of lines, and the thread that writes them. Lines keep their order.

    If writing fails, as on a full disk, the thread tries again every second.
    """

    def __init__(
        self, write: Write, dropped: Callable[[int], bytes], failed: Callable[[OSError], None] = lambda _: None
    ) -> None:
        """``dropped`` makes the line which tells that so many are missing. ``failed`` learns of each failure.

        The thread calls all three.
        """
        self._write = write
        self._dropped_line = dropped
        self._failed = failed
        self.dropped = 0
        """How many lines were dropped, ever."""
        self._untold = 0
        self._lines: list[bytes] = []
        self._bytes = 0
        # A signal handler or a finalizer may log while its thread has the lock.
        self._lock = threading.RLock()
        self._written = threading.Condition(self._lock)
        # Plain locks: the other kinds of threading are written in Python, and cost several times as much.
        self._wake, self._end = threading.Lock(), threading.Lock()
        self._wake.acquire()
        self._end.acquire()
        self._waits = self._ending = self._hopeless = False
        self._thread: threading.Thread | None = None

    def write(self, lines: bytes, most: int = MOST_BYTES) -> None:
        """Write whole lines soon, unless more than ``most`` bytes would wait then."""
        with self._lock:
            if self._bytes + len(lines) > most:
                count = lines.count(b"\n")
                self.dropped += count
                self._untold += count
            else:
                if self._untold:
                    self._tell()
                self._lines.append(lines)
                self._bytes += len(lines)
            if self._waits:
                self._waits = False
                self._wake.release()
            elif self._thread is None:
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()

    def flush(self) -> None:
        """Wait until all lines are written, as long as there is progress. The process is about to end."""
        with self._written:
            if not self._ending:
                self._ending = True
                self._end.release()
            # The thread tells at once what it has not told yet.
            while (self._bytes or self._untold) and not self._hopeless:
                before = self._bytes
                # Each write notifies it.
                self._written.wait(_END_S)
                if self._bytes == before:
                    return

    def _tell(self) -> None:
        line = self._dropped_line(self._untold)
        self._untold = 0
        self._lines.append(line)
        self._bytes += len(line)

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._untold:
                    self._tell()
                lines, self._lines = self._lines, []
                self._waits = not lines
            if not lines:
                self._wake.acquire()
                continue
            self._write_all(b"".join(lines))
            self._pause(_PAUSE_S)

    def _write_all(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                count = self._write(rest[:_CHUNK_BYTES])
            except OSError as error:
                self._failed(error)
                if self._ending:
                    self._note(0, hopeless=True)
                    time.sleep(_RETRY_S)
                self._pause(_RETRY_S)
                continue
            rest = rest[count:]
            self._note(count)

    def _pause(self, seconds: float) -> None:
        """Wait, but not at the end of the process."""
        if not self._ending and self._end.acquire(timeout=seconds):
            self._end.release()

    def _note(self, count: int, *, hopeless: bool = False) -> None:
        with self._lock:
            self._bytes -= count
            if self._ending:
                self._hopeless = hopeless
                self._written.notify_all()


def write_stderr(data: memoryview) -> int:
    """Write to standard error. Raises OSError."""
    while True:
        with suppress(BlockingIOError):
            return os.write(2, data)
        # Another process has made it so for all that share it.
        poll = select.poll()
        poll.register(2, select.POLLOUT)
        poll.poll(_BLOCKED_MS)
