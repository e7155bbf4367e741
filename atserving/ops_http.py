"""The HTTP port of a service for its operators: a few pages, such as ``/metrics`` for Prometheus.

It is plain text, and answers probes, too: those of Kubernetes ask no gRPC server over TLS.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Mapping

import structlog
from httpunk.asyncio import H1ServerProtocol, ServerConnections
from httpunk.h1.server import ServerRequest

from atserving.errors import StartError
from atserving.loopback import is_loopback
from atserving.sockets import refusal

log = structlog.get_logger()

_STOP_S = 0.5

Page = Callable[[str], tuple[bytes, str] | Awaitable[tuple[bytes, str]]]
"""Returns the body and the content type of a page, in a format of the caller's Accept header."""


class OpsServer:
    """Serves the pages from its start until it is stopped, which an async context manager does, too."""

    def __init__(self, listen: str, pages: Mapping[str, Page], is_ready: Callable[[], bool]) -> None:
        """``pages`` are those of each path. ``/live`` and ``/ready`` are answered besides."""
        self._listen = listen
        self._pages = pages
        self._is_ready = is_ready
        self._connections = ServerConnections()
        self._only_loopback = False
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        """Raises StartError if the address is not available."""

        class Connection(H1ServerProtocol):
            async def handle(_, request: ServerRequest) -> None:  # noqa: N805 - self is the server
                await self._answer(request)

        host, _, wanted = self._listen.rpartition(":")
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                self._connections.track(Connection), host.strip("[]") or None, int(wanted)
            )
        except OSError as error:
            raise StartError(f"cannot listen on {self._listen} for --http: {refusal(error)}") from None
        address, port, *_ = self._server.sockets[0].getsockname()
        self.port, self._only_loopback = int(port), ipaddress.ip_address(address).is_loopback

    async def stop(self) -> None:
        """Stop listening, and close the connections."""
        if self._server:
            self._server.close()
            await self._connections.shutdown(timeout=_STOP_S)

    async def __aenter__(self) -> OpsServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _answer(self, request: ServerRequest) -> None:
        status, content_type, body = 500, "text/plain", b"failed, see the log\n"
        try:
            status, content_type, body = await self._page(request)
        except Exception:
            log.exception("request failed", path=request.path)
        await request.respond(status, headers={"content-type": content_type}, body=body)

    async def _page(self, request: ServerRequest) -> tuple[int, str, bytes]:
        """Return the status, the content type and the body of a page."""
        if request.method not in ("GET", "HEAD"):
            return 405, "text/plain", b"GET a page\n"
        if self._only_loopback and not is_loopback(_text(request, "host")):
            return 421, "text/plain", b"this port answers only to a loopback host\n"
        path = request.path.partition("?")[0]
        if path == "/live":
            return 200, "text/plain", b"live\n"
        if path == "/ready":
            return (200, "text/plain", b"ready\n") if self._is_ready() else (503, "text/plain", b"not ready\n")
        if page := self._pages.get(path):
            found = page(_text(request, "accept"))
            body, content_type = await found if isinstance(found, Awaitable) else found
            return 200, content_type, body
        return 404, "text/plain", f"the pages are: {', '.join((*self._pages, '/live', '/ready'))}\n".encode()


def _text(request: ServerRequest, name: str) -> str:
    """Return a header; empty if the request has none."""
    value = request.headers.get(name) or b""
    return value if isinstance(value, str) else value.decode("latin-1")
