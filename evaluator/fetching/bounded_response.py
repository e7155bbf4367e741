"""Bounds what a host sends in place of a resource: interim responses without end, long heads of chunks, empty lines.

aiohttp bounds the time of a response and the size of its body, but parses all the rest as fast as it arrives. It takes
what a host has sent before a request for the response to it, and keeps any number of idle connections.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

_REST_BYTES = 1 << 20
_MOST_HEADS = 8


class BoundedResponse(ResponseHandler):
    """The protocol of one connection to a host. It breaks the connection off if a response exceeds a bound."""

    def __init__(self, loop: asyncio.AbstractEventLoop, max_bytes: int) -> None:
        """``max_bytes`` bounds a body; head, chunks' heads and trailers may be 1 MiB more."""
        super().__init__(loop)
        self._most_bytes = max_bytes + _REST_BYTES
        self._bytes = self._heads = 0
        self._is_final = False

    def set_response_params(self, **params: Any) -> None:
        """Begin a response."""
        self._bytes = self._heads = 0
        self._is_final = False
        super().set_response_params(**params)

    def data_received(self, data: bytes) -> None:
        self._bytes += len(data)
        # What follows a whole response, nobody has asked for.
        is_idle = self._is_final and (self._payload is None or self._payload.is_eof())
        if self._bytes > self._most_bytes or (data and is_idle):
            self._break_off()
        else:
            super().data_received(data)

    def feed_data(self, data: Any, size: int = 0) -> None:
        """Take the head of a response, or of an interim one."""
        self._heads += 1
        self._is_final = data[0].code >= 200
        if self._heads > _MOST_HEADS:
            self._break_off()
        else:
            super().feed_data(data, size)

    def _break_off(self) -> None:
        if self.transport:
            self.transport.abort()


class BoundedConnector(aiohttp.TCPConnector):
    """Connects to hosts whose responses are bounded."""

    def __init__(self, max_bytes: int, **options: Any) -> None:
        super().__init__(**options)
        # aiohttp has no public way to choose the protocol, nor to bound what is idle.
        self._factory = partial(BoundedResponse, self._loop, max_bytes)  # type: ignore[assignment] # a subclass

    def _release(self, key: Any, protocol: ResponseHandler, *, should_close: bool = False) -> None:
        """Keep a connection for the next request, unless as many are kept as may be open."""
        is_full = sum(map(len, self._conns.values())) >= self._limit
        super()._release(key, protocol, should_close=should_close or is_full)
