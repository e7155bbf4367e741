"""The HTTP port for operators: ``/metrics`` for Prometheus, ``/status`` as JSON."""

from __future__ import annotations

from aiohttp import web

from atserving.errors import StartError
from evaluator.serving.metrics import Metrics
from evaluator.serving.status import Status


class OpsServer:
    """Serves from before the net loads until the process ends. Use it as an async context manager."""

    def __init__(self, listen: str, metrics: Metrics, status: Status) -> None:
        self._listen = listen
        self._metrics = metrics
        self._status = status
        app = web.Application()
        app.router.add_get("/metrics", self._show_metrics)
        app.router.add_get("/status", self._show_status)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        self.port = 0

    async def __aenter__(self) -> OpsServer:
        """Raises StartError if the address is not available."""
        host, _, port = self._listen.rpartition(":")
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host.strip("[]") or None, int(port)).start()
        except OSError:
            await self._runner.cleanup()
            raise StartError(
                f"cannot listen on {self._listen} for --http: the address is in use or not this machine's"
            ) from None
        self.port = int(self._runner.addresses[0][1])
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _show_metrics(self, request: web.Request) -> web.Response:
        body, content_type = self._metrics.expose(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _show_status(self, _: web.Request) -> web.Response:
        return web.Response(body=self._status.to_json(), content_type="application/json")
