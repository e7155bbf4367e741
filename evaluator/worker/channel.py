"""The worker's end of the socket to the front: frames of :mod:`atserving.link`, read and written by blocking calls.

The worker may run a release's script, so the front only parses its frames and never unpickles. START carries JSON: to
the worker the net's ``cfg``, the plan and the delay, back the plan or the error. SETTINGS carries JSON with what may
change at run time. Each call gets one reply, also a cancelled one.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from atserving import frames, link
from evaluator.runtime import memory

SKIPPED = -1
"""The kind of the start of a call for which memory was short: its first :data:`frames.START_BYTES`."""

# A large payload would cost more to copy than a system call of its own.
_JOIN_BYTES = 1 << 16


class Frame(NamedTuple):
    """A frame, whose payload is ``data[start:end]``."""

    kind: int
    data: link.Buffer
    start: int
    end: int

    @property
    def payload(self) -> link.Buffer:
        return link.part(self.data, self.start, self.end)


class Channel:
    """The socket. One thread may read while others write."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._frames: list[Frame] = []
        self.drained = False
        """Whether the last :meth:`receive` took all that had arrived."""
        # The front is trusted; a request with fetched resources may exceed the limit of a link.
        self._reader = frames.FrameReader(self._take, max_bytes=1 << 32)
        self._reader.place = self._place

    def _take(self, kind: int, data: link.Buffer, start: int, end: int) -> None:
        self._frames.append(Frame(kind, data, start, end))

    def _place(self, kind: int, length: int, data: bytes, start: int) -> memoryview | None:
        try:
            return frames.buffer(length)
        except MemoryError:
            # What waits for its next use may be enough.
            memory.give_back()
        with suppress(MemoryError):
            return frames.buffer(length)
        # Nobody misses other frames: a call that is not taken back runs.
        if kind == link.CALL:
            self._take(SKIPPED, data, start, start + frames.START_BYTES)
        return None

    def fileno(self) -> int:
        return self._connection.fileno()

    def receive(self, flags: int = 0) -> list[Frame]:
        """Wait for data, and return the frames that are complete with it.

        Raises EOFError if the front has closed the socket, OSError (BlockingIOError with ``MSG_DONTWAIT``).
        """
        space = self._reader.space()
        count = self._connection.recv_into(space, 0, flags)
        if not count:
            raise EOFError
        self.drained = count < len(space)
        if data := self._reader.filled(count):
            self._reader.feed(data)
        taken, self._frames = self._frames, []
        return taken

    def send(self, parts: Sequence[link.Buffer]) -> None:
        """Send frames in parts. Raises OSError if the front has closed the socket."""
        if sum(map(len, parts)) <= _JOIN_BYTES:
            self._connection.sendall(b"".join(parts))
            return
        for part in parts:
            self._connection.sendall(part)
