"""One Envoy for the tests of a file, in front of three fake gates."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.envoy.rig import Edge


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def edge() -> AsyncIterator[Edge]:
    async with Edge(gates=3) as edge:
        yield edge
