"""An HTTP proxy that notes what it is asked for, and resolves the names of tests in its own way."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_HEAD_END = b"\r\n\r\n"


@dataclass
class HttpProxy:
    """Answers absolute-form requests and CONNECT, if they show its credentials."""

    names: dict[str, str]
    """The addresses that it connects to for names; others are unknown to it."""
    credentials: str = ""
    port: int = 0
    asked: list[str] = field(default_factory=list)
    """The first lines of the requests."""
    heads: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(_HEAD_END)
            await self._answer(head.decode(), reader, writer)
        writer.close()

    async def _answer(self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, _, rest = head.partition("\r\n")
        method, target, _ = first.split(" ")
        self.asked.append(f"{method} {target}")
        self.heads.append(rest)
        shown = base64.b64encode(self.credentials.encode()).decode()
        if self.credentials and f"Proxy-Authorization: Basic {shown}" not in rest.split("\r\n"):
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")
            return
        parts = urlsplit(target if "://" in target else f"//{target}")
        address = self.names.get(parts.hostname or "")
        if not address:
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n")
            return
        other_reader, other = await asyncio.open_connection(address, parts.port or 80)
        if method == "CONNECT":
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            lines = [line for line in rest.split("\r\n") if not line.lower().startswith("proxy-")]
            path = target.partition(parts.netloc)[2] or "/"
            other.write(f"{method} {path} HTTP/1.1\r\nConnection: close\r\n".encode() + "\r\n".join(lines).encode())
        await asyncio.gather(_pass(reader, other), _pass(other_reader, writer))


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while part := await reader.read(65536):
            writer.write(part)
            await writer.drain()
    with suppress(OSError):
        writer.close()


@asynccontextmanager
async def http_proxy(names: dict[str, str], credentials: str = "") -> AsyncIterator[HttpProxy]:
    """Run a proxy."""
    proxy = HttpProxy(names, credentials)
    server = await asyncio.start_server(proxy, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    yield proxy
    server.close()
