"""The probes of a kubelet, which are HTTP requests."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

# The pods' addresses are loopback ones here, where our services answer only to the names of this machine.
_HOST = {"host": "localhost"}


async def passes(probe: dict[str, Any], ip: str, ports: dict[str, int]) -> bool:
    """Whether a container answers a probe once, within ``timeoutSeconds``. ``ports`` are the container's, by name."""
    port, path = probe["httpGet"]["port"], probe["httpGet"]["path"]
    url = f"http://{ip}:{ports[port] if isinstance(port, str) else port}{path}"
    try:
        async with (
            asyncio.timeout(probe.get("timeoutSeconds", 1)),
            aiohttp.ClientSession() as session,
            session.get(url, headers=_HOST, allow_redirects=False) as response,
        ):
            return 200 <= response.status < 400
    except (TimeoutError, OSError, aiohttp.ClientError):
        return False
