"""One port for gates and for gRPC: the first bytes of a connection tell which protocol it speaks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from atserving import link
from atserving.frame_protocol import FrameProtocol
from atserving.sockets import listening_socket

# A connection that sends nothing says nothing of its protocol.
_FIRST_BYTES_S = 10.0

Factory = Callable[[], asyncio.Protocol | FrameProtocol]


class Listener:
    """Listens on a port, and hands each connection to the protocol that its first bytes name."""

    def __init__(self, linked: Factory, other: Factory) -> None:
        """``linked`` makes the protocol of links, ``other`` that of all other connections."""
        self._linked = linked
        self._other = other
        self._server: asyncio.Server | None = None

    async def start(self, listen: str, *, insecure: bool = False) -> int:
        """Listen on ``host:port`` (port 0: any free port) and return the port. Raises StartError.

        ``insecure``: the address need not be a loopback one.
        """
        own = await listening_socket(listen, insecure=insecure)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Unknown(self._linked, self._other), sock=own)
        return int(own.getsockname()[1])

    def close(self) -> None:
        """Accept no more connections."""
        if self._server:
            self._server.close()


class _Unknown(asyncio.Protocol):
    """A connection whose first bytes have not arrived."""

    def __init__(self, linked: Factory, other: Factory) -> None:
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
        protocol = (self._linked if self._data.startswith(link.MAGIC) else self._other)()
        # uvloop asks a protocol only when reading starts whether it brings buffers of its own.
        self._transport.pause_reading()
        self._transport.set_protocol(protocol)
        self._transport.resume_reading()
        protocol.connection_made(self._transport)
        protocol.data_received(self._data)
