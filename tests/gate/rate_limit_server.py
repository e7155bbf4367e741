"""A rate limit service as small as can be: it counts in windows that never end, unless the test ends them.

It speaks Envoy's protocol over real gRPC. Envoy's own service is a Go program beside a Redis, in no index of packages.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from atserving.v1.ratelimit_pb2 import RateLimitRequest, RateLimitResponse
from gate.rate_limit_service import METHOD


class RateLimitServer:
    """Counts exactly, as Envoy's service does: a refused request counts, too."""

    def __init__(self) -> None:
        self.requests: list[RateLimitRequest] = []
        self.counts: Counter[tuple[str, ...]] = Counter()
        self.domain = "atserving"
        self.left_s = 30
        """The whole seconds until the window ends, as its answers say."""
        self.answer = b""
        """What it sends in place of its answers."""
        self.answers = asyncio.Event()
        """Whether it answers."""
        self.answers.set()
        self.port = 0
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Listen on the port, or on any if it had none."""
        _, service, method = METHOD.split("/")
        handler = grpc.unary_unary_rpc_method_handler(
            self.should_limit,
            RateLimitRequest.FromString,
            lambda response: self.answer or response.SerializeToString(),
        )
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        """Break off all connections."""
        if self._server:
            await self._server.stop(None)

    async def should_limit(self, request: RateLimitRequest, _: object) -> RateLimitResponse:
        self.requests.append(request)
        await self.answers.wait()
        response = RateLimitResponse(overall_code=RateLimitResponse.OK)
        for descriptor in request.descriptors:
            status = response.statuses.add(code=RateLimitResponse.OK)
            if request.domain != self.domain:
                continue
            key = tuple(entry.value for entry in descriptor.entries)
            self.counts[key] += request.hits_addend or 1
            most = descriptor.limit.requests_per_unit
            status.current_limit.requests_per_unit = most
            status.current_limit.unit = descriptor.limit.unit
            status.duration_until_reset.seconds = self.left_s
            status.limit_remaining = max(0, most - self.counts[key])
            if self.counts[key] > most:
                status.code = response.overall_code = RateLimitResponse.OVER_LIMIT
        return response


@asynccontextmanager
async def running_server() -> AsyncIterator[RateLimitServer]:
    """Run a rate limit service."""
    server = RateLimitServer()
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
