"""A request that kills a gate meets at most two of them."""

from __future__ import annotations

import grpc.aio
import pytest

from atserving import transport
from atserving.local.proc import is_alive
from tests.envoy.fake_gate import POISON
from tests.envoy.rig import TYPED_EVAL, Edge
from tests.processes import Process
from tests.waiting import until, until_async

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("body", [POISON, POISON + bytes(15 << 20)], ids=["small", "large"])
async def test_a_request_that_kills_gates_kills_two_and_is_a_503(edge: Edge, body: bytes) -> None:
    await all_connected(edge)
    status, answer = await edge.ask(body)
    assert (status, answer) == (503, {"code": 503, "message": "the gates broke off while they had this request"})
    await check_two_died(edge)


async def test_a_call_that_kills_gates_kills_two_and_is_unavailable(edge: Edge) -> None:
    await all_connected(edge)
    async with transport.channel(f"127.0.0.1:{edge.ports.edge}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(TYPED_EVAL, None, None)(POISON)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "the gates broke off while they had this request"
    await check_two_died(edge)


async def check_two_died(edge: Edge) -> None:
    # The kernel closes the connections of a process before it is dead.
    await until(lambda: len(_dead(edge)) >= 2, "two gates are dead")
    # The third goes on, and the next caller reaches it.
    assert (await edge.ask())[0] == 200
    dead = _dead(edge)
    assert len(dead) == 2
    for gate in dead:
        gate.wait()
        gate.start()


def _dead(edge: Edge) -> list[Process]:
    return [gate for gate in edge.gates if not is_alive(gate.pid)]


async def all_connected(edge: Edge) -> None:
    """Wait until Envoy has a connection to every gate. A failed one would count as an attempt at the next request."""

    async def connected() -> bool:
        await edge.ask()
        return await edge.stat("cluster.gate.upstream_cx_active") == len(edge.gates)

    await edge.all_healthy()
    await until_async(connected, what="every gate is connected")
