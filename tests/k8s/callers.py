"""Callers of the HTTP API, who ask through the Envoys of a cluster."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import orjson

from atserving.local import examples
from tests.k8s.cluster import Cluster

SEVEN = (examples.FOLDER / "digits" / "images" / "7.png").read_bytes()
BYTES = {"content-type": "application/octet-stream"}
PATIENCE_S = 60.0
_PAUSE_S = 0.05


async def answered(url: str, app: str = "digits", tls: ssl.SSLContext | None = None) -> None:
    """Wait until an eval through an Envoy is answered."""
    async with aiohttp.ClientSession() as session, asyncio.timeout(PATIENCE_S):
        while True:
            async with session.post(f"{url}/v1/eval/{app}", data=SEVEN, headers=BYTES, ssl=tls or True) as response:
                if response.status == 200:
                    return
            await asyncio.sleep(_PAUSE_S)


class Callers:
    """Callers that keep their connections: each asks one Envoy until Envoy closes the connection, or it fails."""

    def __init__(self, cluster: Cluster, path: str) -> None:
        self.answers: Counter[str] = Counter()
        """``ok``, or what went wrong, and how often."""
        self._cluster = cluster
        self._path = path
        self._changed = asyncio.Event()

    async def ask(self) -> None:
        while True:
            # A Service sends a new connection to any ready pod.
            if not (envoys := self._cluster.endpoints("envoy")):
                self.answers["no Envoy is ready"] += 1
                await asyncio.sleep(_PAUSE_S)
                continue
            envoy = random.choice(envoys)
            async with aiohttp.ClientSession(f"http://{envoy}:8080") as session:
                while await self._ask_once(session):  # noqa: ASYNC110 - a pace, not a condition
                    await asyncio.sleep(_PAUSE_S)

    async def _ask_once(self, session: aiohttp.ClientSession) -> bool:
        """Whether the connection may be used again."""
        try:
            async with session.post(self._path, data=SEVEN, headers=BYTES) as response:
                body = await response.read()
                result = orjson.loads(body).get("result")
                good = result == "at last" or (result and result["confidences"][0]["class"] == "seven")
                self.answers["ok" if good else body.decode()] += 1
                return response.headers.get("connection") != "close"
        except aiohttp.ClientError as error:
            self.answers[repr(error)] += 1
            return False
        finally:
            self._changed.set()

    async def more(self, count: int) -> None:
        """Wait for so many more answers."""
        enough = self.answers.total() + count
        async with asyncio.timeout(PATIENCE_S):
            while self.answers.total() < enough:
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def load(cluster: Cluster, path: str, callers: int, some: int) -> AsyncIterator[Callers]:
    """Keep up a load while the block runs. Afterwards not one request may have failed."""
    asking = Callers(cluster, path)
    tasks = [asyncio.create_task(asking.ask()) for _ in range(callers)]
    try:
        await asking.more(some)
        yield asking
        await asking.more(some)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert asking.answers.keys() == {"ok"}, asking.answers
