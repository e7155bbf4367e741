"""The probes of a kubelet: gRPC health checks and HTTP requests."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc


async def passes(probe: dict[str, Any], ip: str, ports: dict[str, int]) -> bool:
    """Whether a container answers a probe once, within ``timeoutSeconds``. ``ports`` are the container's, by name."""
    try:
        async with asyncio.timeout(probe.get("timeoutSeconds", 1)):
            if "grpc" in probe:
                return await _grpc(f"{ip}:{probe['grpc']['port']}", probe["grpc"].get("service", ""))
            port = probe["httpGet"]["port"]
            return await _http(
                f"http://{ip}:{ports[port] if isinstance(port, str) else port}{probe['httpGet']['path']}"
            )
    except (TimeoutError, OSError, aiohttp.ClientError, grpc.aio.AioRpcError):
        return False


async def _grpc(address: str, service: str) -> bool:
    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await health_pb2_grpc.HealthStub(channel).Check(request)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def _http(url: str) -> bool:
    async with aiohttp.ClientSession() as session, session.get(url, allow_redirects=False) as response:
        return 200 <= response.status < 400
