"""A host with resources, for the tests of fetches."""

from __future__ import annotations

import asyncio
import gzip
import ssl
from dataclasses import dataclass, field

from aiohttp import web
from multidict import CIMultiDictProxy

MAX_BYTES = 100_000
ZIPPED = {"fair": gzip.compress(bytes(MAX_BYTES)), "bomb": gzip.compress(bytes(64 << 20))}
# The server listens on both addresses; the policy allows only the first.
ALLOWED, FORBIDDEN = "127.0.0.2", "127.0.0.3"


@dataclass
class Site:
    """A host that counts its requests. The path of a request chooses the response."""

    port: int = 0
    runner: web.AppRunner | None = None
    hits: list[str] = field(default_factory=list)
    headers: list[CIMultiDictProxy[str]] = field(default_factory=list)
    running: int = 0
    most: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def listen(self, host: str, secure: ssl.SSLContext | None = None) -> None:
        """Listen with plain HTTP on the site's port, or with TLS on a new port. The site keeps the port."""
        assert self.runner
        listener = web.TCPSite(self.runner, host, 0 if secure else self.port, ssl_context=secure)
        await listener.start()
        self.port = self.runner.addresses[-1][1]

    def url(self, path: str, host: str = ALLOWED) -> str:
        return f"http://{host}:{self.port}{path}"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.hits.append(request.path)
        self.headers.append(request.headers)
        kind, _, rest = request.path.strip("/").partition("/")
        match kind:
            case "bytes":
                return web.Response(body=bytes(int(rest)))
            case "status":
                return web.Response(status=int(rest), body=b"the response body")
            case "to":
                return web.Response(status=302, headers={"Location": request.query["url"]})
            case "loop":
                raise web.HTTPTemporaryRedirect("/loop")
            case "hops":
                raise web.HTTPMovedPermanently(f"/hops/{int(rest) - 1}" if int(rest) > 1 else "/bytes/7")
            case "cookie":
                response = web.Response(body=request.headers.get("Cookie", "none").encode())
                response.set_cookie("session", "secret")
                return response
            case "endless":
                return await self._endless(request, bytes(10_000))
            case "chunks":
                chunked = web.StreamResponse()
                await chunked.prepare(request)
                for _ in range(int(rest)):
                    await chunked.write(b"1")
                return chunked
            case "drip":
                return await self._endless(request, b"1", 0.001)
            case "host":
                return web.Response(body=request.host.encode())
            case "gzip":
                return web.Response(body=ZIPPED[rest], headers={"Content-Encoding": "gzip"})
            case "broken":
                assert request.transport
                request.transport.abort()
                return web.Response()
            case "wait":
                self.running += 1
                self.most = max(self.most, self.running)
                await self.gate.wait()
                self.running -= 1
                return web.Response(body=b"waited")
        raise web.HTTPNotFound

    async def _endless(self, request: web.Request, piece: bytes, pause_s: float = 0) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(piece)
            await asyncio.sleep(pause_s)
