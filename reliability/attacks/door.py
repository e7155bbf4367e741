"""Raw connections to an Envoy."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

_PATIENCE_S = 15.0


@dataclass(frozen=True)
class Door:
    """An Envoy's port for callers."""

    edge: str
    """Its URL."""

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        url = urlsplit(self.edge)
        return await asyncio.open_connection(url.hostname, url.port)

    async def raw(self, request: bytes) -> bytes:
        """Send bytes on a connection of their own; return all that comes until Envoy closes it, or for 15 s."""
        reader, writer = await self.connect()
        answer = b""
        try:
            writer.write(request)
            with suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(_PATIENCE_S):
                    while part := await reader.read(1 << 16):
                        answer += part
        finally:
            writer.transport.abort()
        return answer


def http1(path: str, content_type: str, length: int, *lines: bytes) -> bytes:
    """Return the head of a request."""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {content_type}\r\ncontent-length: {length}\r\n"
    return head.encode() + b"".join(line + b"\r\n" for line in lines) + b"\r\n"
