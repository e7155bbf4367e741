"""One real mesh for the tests of the public API, and a client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest_asyncio

from atserving.local.mesh import Mesh
from tests.e2e.client import UNUSED_PORT, Client


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def mesh() -> AsyncIterator[Mesh]:
    async with Mesh(extra={"evaluator-digits-v1": ["--allow-network", f"127.0.0.1:{UNUSED_PORT}"]}) as mesh:
        yield mesh


@pytest_asyncio.fixture(loop_scope="session")
async def client(mesh: Mesh) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(mesh, session)
