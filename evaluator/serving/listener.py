"""One port for gates and for gRPC: the first bytes of a connection tell which protocol it speaks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import structlog

from atserving import link
from atserving.frame_protocol import FrameProtocol
from atserving.sockets import listening_socket
from atserving.tls import GATE, Tls, peer_names
from atserving.tls_server import TlsServer, accept

log = structlog.get_logger()

# A connection that sends nothing says nothing of its protocol.
_FIRST_BYTES_S = 10.0

Factory = Callable[[], asyncio.Protocol | FrameProtocol]


class Listener:
    """Listens on a port, and hands each connection to the protocol that its first bytes name."""

    def __init__(self, linked: Factory, other: Factory, tls: Tls | None = None) -> None:
        """``linked`` makes the protocol of links, ``other`` that of all other connections.

        With ``tls`` only gates may have links.
        """
        self._linked = linked
        self._other = other
        self._tls = tls
        self._server: asyncio.Server | TlsServer | None = None

    async def start(self, listen: str, *, insecure: bool = False) -> int:
        """Listen on ``host:port`` (port 0: any free port) and return the port. Raises StartError.

        ``insecure``: without TLS, too, the address need not be a loopback one.
        """
        own = await listening_socket(listen, insecure=insecure or self._tls is not None)
        port = int(own.getsockname()[1])
        gate = self._tls.uri(GATE) if self._tls else None
        self._server = await accept(own, lambda: _Unknown(self._linked, self._other, gate), self._tls)
        return port

    def close(self) -> None:
        """Accept no more connections."""
        if self._server:
            self._server.close()


class _Unknown(asyncio.Protocol):
    """A connection whose first bytes have not arrived."""

    def __init__(self, linked: Factory, other: Factory, gate: str | None) -> None:
        """``gate`` is the name that links need; None: there is no TLS."""
        self._gate = gate
        self._linked = linked
        self._other = other
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._timer = asyncio.get_running_loop().call_later(_FIRST_BYTES_S, self._transport.abort)

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._data += data
        if len(self._data) < len(link.MAGIC):
            return
        self._timer.cancel()
        is_link = self._data.startswith(link.MAGIC)
        if is_link and self._gate is not None and self._gate not in (names := peer_names(self._transport)):
            log.warning("connection refused", reason=f"{', '.join(names)[:200] or 'its peer'} is no gate: {self._gate}")
            self._transport.abort()
            return
        protocol = (self._linked if is_link else self._other)()
        # uvloop asks a protocol only when reading starts whether it brings buffers of its own.
        self._transport.pause_reading()
        self._transport.set_protocol(protocol)
        self._transport.resume_reading()
        protocol.connection_made(self._transport)
        protocol.data_received(self._data)
