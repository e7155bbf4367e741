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

from atserving import log_page
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
        """``pages`` are those of each path. ``/live``, ``/ready`` and ``/log`` are answered besides."""
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
            def connection_made(connection, transport: asyncio.BaseTransport) -> None:  # noqa: N805 - self is the server
                connection.peer = str((transport.get_extra_info("peername") or ("",))[0])
                super().connection_made(transport)  # type: ignore[no-untyped-call]

            async def handle(connection, request: ServerRequest) -> None:  # noqa: N805
                await self._answer(request, connection.peer)

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

    async def _answer(self, request: ServerRequest, peer: str) -> None:
        status, content_type, body = 500, "text/plain", b"failed, see the log\n"
        try:
            status, content_type, body = await self._page(request, peer)
        except Exception:
            log.exception("request failed", path=request.path)
        await request.respond(status, headers={"content-type": content_type}, body=body)

    async def _page(self, request: ServerRequest, peer: str) -> tuple[int, str, bytes]:
        """Return the status, the content type and the body of a page."""
        path, _, query = request.path.partition("?")
        if request.method not in ("GET", "HEAD") and (path, request.method) != ("/log", "PUT"):
            return 405, "text/plain", b"GET a page\n"
        if (self._only_loopback or path == "/log") and not is_loopback(_text(request, "host")):
            what = "port" if self._only_loopback else "page"
            return 421, "text/plain", f"this {what} answers only to a loopback host\n".encode()
        if path == "/log":
            return _log(request, query, peer)
        if path == "/live":
            return 200, "text/plain", b"live\n"
        if path == "/ready":
            return (200, "text/plain", b"ready\n") if self._is_ready() else (503, "text/plain", b"not ready\n")
        if page := self._pages.get(path):
            found = page(_text(request, "accept"))
            body, content_type = await found if isinstance(found, Awaitable) else found
            return 200, content_type, body
        return 404, "text/plain", f"the pages are: {', '.join((*self._pages, '/live', '/ready', '/log'))}\n".encode()


def _log(request: ServerRequest, query: str, peer: str) -> tuple[int, str, bytes]:
    """Show or change what the process logs, to this machine's programs alone."""
    address = ipaddress.ip_address(peer.partition("%")[0] or "::")
    if not (getattr(address, "ipv4_mapped", None) or address).is_loopback:
        return 403, "text/plain", b"this page answers only on a loopback address: use kubectl port-forward\n"
    if request.headers.get("origin") is not None:
        return 403, "text/plain", b"this page answers no web page\n"
    if request.method == "PUT":
        try:
            log_page.change(query, peer)
        except log_page.SettingError as error:
            return 400, "text/plain", f"{error}\n".encode()
    return 200, "application/json", log_page.shown()


def _text(request: ServerRequest, name: str) -> str:
    """Return a header; empty if the request has none."""
    value = request.headers.get(name) or b""
    return value if isinstance(value, str) else value.decode("latin-1")
