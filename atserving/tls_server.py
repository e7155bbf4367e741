"""Accepts connections over TLS, each with the certificates of the moment."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import cast

import structlog

from atserving.tls import CLOSE_S, HANDSHAKE_S, Tls, why

log = structlog.get_logger()

# Of more unfinished handshakes, the oldest is given up: those of the mesh take milliseconds.
_MOST_HANDSHAKES = 512
_TURN = 16
# Without free files, the next attempt to accept comes after this time.
_RETRY_S = 1.0
_LOG_S = 1.0

Factory = Callable[[], asyncio.BaseProtocol]


async def accept(listening: socket.socket, factory: Factory, tls: Tls | None) -> asyncio.Server | TlsServer:
    """Accept the connections of a listening socket, with or without TLS."""
    if tls:
        return TlsServer(listening, factory, tls)
    # uvloop asks for no particular kind of protocol.
    made = cast(Callable[[], asyncio.Protocol], factory)
    return await asyncio.get_running_loop().create_server(made, sock=listening)


class TlsServer:
    """Accepts the connections of a listening socket until it is closed. The connections outlive it."""

    def __init__(self, listening: socket.socket, factory: Factory, tls: Tls) -> None:
        """``factory`` makes the protocol of a connection, which hears of it after the handshake."""
        self._listening = listening
        self._factory = factory
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._handshakes: dict[asyncio.Task[None], None] = {}
        self._retry: asyncio.TimerHandle | None = None
        self._logged_s = 0.0
        self._unlogged = 0
        listening.setblocking(False)
        self._loop.add_reader(listening, self._accept)

    def close(self) -> None:
        """Accept no more connections. It may be called again."""
        if self._listening.fileno() < 0:
            return
        if self._retry:
            self._retry.cancel()
        self._loop.remove_reader(self._listening)
        self._listening.close()
        for each in list(self._handshakes):
            each.cancel()

    def _accept(self) -> None:
        for _ in range(_TURN):
            try:
                accepted, address = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("connections not accepted", reason=error.strerror)
                self._loop.remove_reader(self._listening)
                self._retry = self._loop.call_later(_RETRY_S, self._accept_again)
                return
            if len(self._handshakes) >= _MOST_HANDSHAKES:
                # It leaves at once: the task ends in a later turn, and the next connections need room in this one.
                oldest = next(iter(self._handshakes))
                del self._handshakes[oldest]
                oldest.cancel()
            task = self._loop.create_task(self._shake(accepted, f"{address[0]}:{address[1]}"))
            self._handshakes[task] = None
            task.add_done_callback(self._shaken)

    def _shaken(self, task: asyncio.Task[None]) -> None:
        self._handshakes.pop(task, None)

    def _accept_again(self) -> None:
        self._loop.add_reader(self._listening, self._accept)

    async def _shake(self, accepted: socket.socket, peer: str) -> None:
        accepted.setblocking(False)
        try:
            await self._loop.connect_accepted_socket(
                cast(Callable[[], asyncio.Protocol], self._factory),
                accepted,
                ssl=self._tls.server,
                ssl_handshake_timeout=HANDSHAKE_S,
                ssl_shutdown_timeout=CLOSE_S,
            )
        except ConnectionAbortedError:
            self._refused(peer, f"it did not finish its handshake within {HANDSHAKE_S:g} s")
        except ConnectionError:
            # Some probes only connect.
            log.debug("connection lost", peer=peer, reason="it ended amid its handshake")
        except OSError as error:
            self._refused(peer, why(error))

    def _refused(self, peer: str, reason: str) -> None:
        """Log a refusal, but no more than one in a second."""
        now_s = time.monotonic()
        if now_s < self._logged_s + _LOG_S:
            self._unlogged += 1
            return
        more = {"more": self._unlogged} if self._unlogged else {}
        self._logged_s, self._unlogged = now_s, 0
        log.warning("connection refused", peer=peer, reason=reason, **more)
