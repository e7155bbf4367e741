"""A front counts a long call before it arrives, and refuses the rest: no number of gates can fill its memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import grpc.aio
import pytest

from atserving import frames, link, transport
from atserving.held import HeldBytes
from atserving.v1 import evaluator_pb2_grpc
from atserving.v1.evaluator_pb2 import Hello, InferRequest, InferResponse
from atserving.v1.serving_pb2 import Resource
from evaluator.serving.pipeline import Pipeline
from gate.bodies import Body
from gate.connection import EvaluatorConnection
from tests.evaluator.calling import DIGIT, address, infer
from tests.evaluator.serving.fronts import front
from tests.evaluator.serving.raw_gate import RawGate, piece
from tests.evaluator.serving.test_link import resident_mb
from tests.pod_memory import forget_most, most_mib
from tests.processes import Registry, evaluator
from tests.waiting import until

MIB = 1 << 20
WAIT_S = 60.0


def error_of(reply: link.Reply) -> tuple[int, bool]:
    """Return the status of an error, and whether it is a refusal."""
    error = InferResponse.FromString(bytes(reply.response)).error
    assert error.retry_after_ms > 0 or error.status != 429
    return error.status, error.refused


async def test_incomplete_calls_are_counted_and_the_rest_refused(tmp_path: Path) -> None:
    held = HeldBytes(16 * MIB)
    async with front(tmp_path, held) as (served, instance), RawGate(instance.address) as gate:
        for id_ in (1, 2):
            await gate.send_call(id_, 5 * MIB, end=MIB)
        await gate.send_call(3, 5 * MIB, end=MIB)
        # Before the rest has arrived; which is skipped.
        refused = await gate.reply()
        assert (refused.id, error_of(refused)) == (3, (429, True))
        assert held.held == 10 * MIB
        await gate.send(piece(3, bytes(MIB), MIB, 5 * MIB))
        # A complete one is counted once, and until its end.
        for at in range(1, 5):
            await gate.send(piece(1, bytes(MIB), at * MIB, 5 * MIB))
        await until(lambda: served.capacity.in_flight == 1)
        assert held.held == 10 * MIB
        await gate.send(link.cancel_frame([1]))
        await until(lambda: held.held == 5 * MIB)
        # There is room again, also after the cancellation of an incomplete one.
        await gate.send_call(4, 5 * MIB, end=MIB)
        await gate.send(link.cancel_frame([2]))
        await gate.send_call(5, 5 * MIB, end=MIB)
        await gate.send_call(6, 5 * MIB, end=MIB)
        assert (await gate.reply()).id == 6
        assert held.held == 10 * MIB


@pytest.mark.parametrize("malformed", [False, True])
async def test_calls_of_a_lost_link_are_given_back(tmp_path: Path, malformed: bool) -> None:
    held = HeldBytes(16 * MIB)
    async with front(tmp_path, held) as (served, instance):
        async with RawGate(instance.address) as gate:
            await gate.send_call(1, 5 * MIB, end=MIB)
            await gate.send_call(2, 4 * MIB)
            await until(lambda: served.capacity.in_flight == 1)
            assert held.held == 9 * MIB
            if malformed:
                await gate.send(link.frame(99))
                with pytest.raises((EOFError, ConnectionError)):
                    await gate.reply()
        await until(lambda: held.held == 0)


def drain(served: Pipeline) -> None:
    served.capacity.drain()


def fill(served: Pipeline) -> None:
    served.capacity.limit = 0


@pytest.mark.parametrize(("close", "status"), [(drain, 503), (fill, 429)])
async def test_calls_without_a_place_are_refused_before_they_arrive(
    tmp_path: Path, close: Callable[[Pipeline], None], status: int
) -> None:
    held = HeldBytes(64 * MIB)
    async with front(tmp_path, held) as (served, instance), RawGate(instance.address) as gate:
        close(served)
        await gate.send_call(1, 20 * MIB, end=MIB)
        assert error_of(await gate.reply()) == (status, True)
        assert held.held == 0


CALL = link.call_head(7, 0, 0, b"", b"", MIB)[link.HEAD.size :]


@pytest.mark.parametrize(
    "sent",
    [
        # A whole frame that should travel in pieces, and a piece that is too long.
        link.HEAD.pack(frames.MAX_SHORT_BYTES + 1, link.CALL),
        link.HEAD.pack(frames.MAX_SHORT_BYTES + 1, frames.PIECE) + bytes(100),
        # A frame in pieces that is too short for it, of another call, and of another kind.
        piece(1, b"x", 0, link.LONG_BYTES - 1),
        piece(1, CALL + bytes(link.LONG_BYTES - len(CALL)), 0, link.LONG_BYTES),
        piece(1, bytes(link.LONG_BYTES), 0, link.LONG_BYTES, kind=link.CANCEL),
        # The id of a call that arrives.
        piece(1, b"x", 0, MIB) + link.call_head(1, 0, 0, b"", b"", 0),
        link.call_head(1, 0, 0, b"", b"", 0) + piece(1, b"x", 0, MIB),
    ],
)
async def test_long_calls_that_would_not_be_counted_are_malformed(tmp_path: Path, sent: bytes) -> None:
    held = HeldBytes(64 * MIB)
    async with front(tmp_path, held) as (_, instance), RawGate(instance.address) as gate:
        await gate.send(sent)
        with pytest.raises((EOFError, ConnectionError)):
            await gate.reply()
        await until(lambda: held.held == 0)


async def test_a_gate_sends_no_more_of_a_refused_call(tmp_path: Path) -> None:
    held = HeldBytes(16 * MIB)
    async with front(tmp_path, held) as (_, instance):
        connection = EvaluatorConnection(instance, WAIT_S)
        large = Body([bytes(60 * MIB)])
        response = await connection.ask(InferRequest(), time.monotonic() + WAIT_S, "r", None, large)
        assert isinstance(response, InferResponse)
        assert (response.error.status, response.error.refused) == (429, True)
        assert connection._link
        assert not connection._link.sends_long
        # The link still serves others.
        small = connection.ask(InferRequest(), 0.0, "r", None)
        with pytest.raises(TimeoutError):
            await small
        await connection.close()


async def test_a_link_without_calls_costs_little(tmp_path: Path) -> None:
    async with front(tmp_path, HeldBytes(MIB)) as (_, instance), AsyncExitStack() as stack:
        before_mb = resident_mb()
        for _ in range(200):
            await stack.enter_async_context(RawGate(instance.address))
        # The gates are in this process, too, with 256 KiB each.
        assert resident_mb() < before_mb + 75


async def test_a_front_stays_below_its_memory_whatever_arrives(registry: Registry) -> None:
    registry.publish("arriving", custom_values={"net": "classify"})
    max_held = 64
    with evaluator(registry, "arriving", "v1", "--max-held", str(max_held)) as process:
        registered = process.logged("address", "instance", event="instance registered")
        hello = Hello(app="arriving", version="v1", instance=registered["instance"])
        assert (await infer(process, DIGIT)).result_json
        forget_most(process)
        before_mib = most_mib(process)
        async with AsyncExitStack() as stack:
            for _ in range(8):
                gate = await stack.enter_async_context(RawGate(registered["address"], hello))
                for id_ in range(1, 4):
                    await gate.send_call(id_, 30 * MIB, end=29 * MIB)
            assert most_mib(process) < before_mib + max_held + 16
            # Small requests have room.
            assert (await infer(process, DIGIT)).result_json


async def test_direct_calls_count_once_beside_those_of_gates(registry: Registry) -> None:
    registry.publish("direct", custom_values={"net": "classify"})
    with evaluator(registry, "direct", "v1", "--max-held", "24") as process:
        async with transport.channel(address(process)) as channel:
            stub = evaluator_pb2_grpc.EvaluatorServiceStub(channel)
            # Three quarters of 24 MiB hold one of these, but not twice; it is no image.
            response = await stub.Infer(InferRequest(data=[Resource(body=bytes(10 * MIB))]))
            assert response.error.status == 400
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Infer(InferRequest(data=[Resource(body=bytes(19 * MIB))]))
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_call_that_arrives_while_the_instance_stops_is_refused(registry: Registry) -> None:
    registry.publish("arriving", custom_values={"net": "classify"})
    with evaluator(registry, "arriving") as process:
        registered = process.logged("address", "instance", event="instance registered")
        hello = Hello(app="arriving", version="v1", instance=registered["instance"])
        async with RawGate(registered["address"], hello) as gate:
            await gate.send_call(1, 3 * MIB, end=MIB)
            process.terminate()
            # It has deregistered, and answered all that was whole, long before the rest arrives.
            await until(lambda: not registry.instances("arriving"))
            for at in (1, 2):
                await gate.send(piece(1, bytes(MIB), at * MIB, 3 * MIB))
            assert error_of(await gate.reply()) == (503, True)
        assert process.wait() == 0
