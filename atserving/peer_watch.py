"""Finds peers that are gone or frozen, so that what they asked for gives up its capacity and its memory."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from collections.abc import Callable

_TURN_S = 2.0
_LATE_S = 1.0
_MOST_PINGS = 2
_UNREAD_S = 8
_INT = struct.Struct("i")


class PeerWatch:
    """Pings a peer that should answer and sends nothing, and says when it is silent.

    It takes 6 to 8 s. The kernel of a frozen process still takes bytes for it, so only an answer shows a live one. A
    peer that has bytes to read may be slow: the kernel watches that it reads.
    """

    def __init__(
        self,
        connection: socket.socket,
        *,
        owes: Callable[[], bool],
        ping: Callable[[], None],
        silent: Callable[[], None],
        turned: Callable[[], None],
    ) -> None:
        """``owes`` tells whether the peer has to be there: an idle one may do as it likes.

        ``turned`` is called every 2 s.
        """
        self.heard = True
        """Set this whenever the peer has sent anything."""
        self._socket = connection
        self._owes = owes
        self._ping = ping
        self._silent = silent
        self._turned = turned
        self._pings = 0
        self._loop = asyncio.get_running_loop()
        _keep_alive(connection)
        self._wait()

    def stop(self) -> None:
        self._timer.cancel()

    def _wait(self) -> None:
        self._due_s = self._loop.time() + _TURN_S
        self._timer = self._loop.call_at(self._due_s, self._turn)

    def _turn(self) -> None:
        # After this process itself has stood still, what the peer sent meanwhile is still to be read.
        late = self._loop.time() > self._due_s + _LATE_S
        if self.heard or late or not self._owes() or _unsent_bytes(self._socket):
            self.heard = False
            self._pings = 0
        elif self._pings == _MOST_PINGS:
            self._silent()
            return
        else:
            self._pings += 1
            self._ping()
        self._wait()
        self._turned()


def _unsent_bytes(connection: socket.socket) -> int:
    """Return how many bytes in the kernel the peer's kernel has not taken yet."""
    (count,) = _INT.unpack(fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(_INT.size)))
    return int(count)


def _keep_alive(connection: socket.socket) -> None:
    """Let the kernel end the connection once the peer's host has gone, or the peer reads nothing."""
    if connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_S * 1000)
