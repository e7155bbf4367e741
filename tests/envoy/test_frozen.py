"""Envoy leaves a gate that stands still, and its callers do not notice."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.envoy.rig import Edge
from tests.envoy.test_retries import all_connected
from tests.waiting import until_async

pytestmark = pytest.mark.asyncio(loop_scope="module")

REQUESTS = 30
# Envoy takes 1.3 s. A machine under load gets more time, but less than any caller would accept.
LEAVES_S = 4.0


@asynccontextmanager
async def frozen_gate(edge: Edge) -> AsyncIterator[None]:
    """Freeze a gate that Envoy is connected to."""
    await all_connected(edge)
    edge.gates[0].freeze()
    try:
        yield
    finally:
        edge.gates[0].send(signal.SIGCONT)
        await edge.all_healthy()


async def ask(edge: Edge) -> None:
    """Send many requests at once; check that each is answered."""
    answers = await asyncio.gather(*(edge.ask() for _ in range(REQUESTS)))
    assert {status for status, _ in answers} == {200}


async def test_requests_that_a_frozen_gate_has_are_answered_by_others(edge: Edge) -> None:
    timeouts, retries = "cluster.gate.http2.keepalive_timeout", "cluster.gate.upstream_rq_retry"
    before = await edge.stat(timeouts), await edge.stat(retries)
    async with frozen_gate(edge):
        async with asyncio.timeout(LEAVES_S):
            await ask(edge)
        assert await edge.stat(timeouts) > before[0]
        assert await edge.stat(retries) > before[1]


async def test_a_frozen_gate_gets_no_new_requests(edge: Edge) -> None:
    async def left() -> bool:
        await edge.ask()
        return re.search(r"^gate::.*::health_flags::/failed", await edge.admin("/clusters"), re.MULTILINE) is not None

    async with frozen_gate(edge):
        await until_async(left, what="Envoy considers the gate unhealthy")
        retries = await edge.stat("cluster.gate.upstream_rq_retry")
        await ask(edge)
        assert await edge.stat("cluster.gate.upstream_rq_retry") == retries
