"""A gate's connections to instances that are gone cost little, and do not keep the gate from stopping."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import grpc
import orjson
import pytest

from atserving.config import PREFIX, Instance
from atserving.local.ports import free_ports
from atserving.v1.evaluator_pb2 import InferRequest
from gate.answers import TransportError
from gate.connection import EvaluatorConnection
from registry.etcd.client import EtcdClient
from registry.etcd.connection import Connection
from tests.processes import Gate, running_registry
from tests.waiting import until

DEAD = 300


def instance(port: int, id_: str = "i") -> Instance:
    return Instance(app="digits", version="v1", id=id_, address=f"127.0.0.1:{port}", capacity=8)


class Closing:
    """A server that closes every connection at once, and when it did."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.times_s.append(time.monotonic())
        writer.close()


@asynccontextmanager
async def closing() -> AsyncIterator[tuple[Closing, EvaluatorConnection]]:
    server = Closing()
    listener = await asyncio.start_server(server, "127.0.0.1", 0)
    connection = EvaluatorConnection(instance(listener.sockets[0].getsockname()[1]))
    try:
        yield server, connection
    finally:
        await connection.close()
        listener.close()


def attempts(server: Closing, count: int) -> Callable[[], bool]:
    return lambda: len(server.times_s) >= count


async def test_attempts_to_reach_a_dead_instance_come_less_and_less_often() -> None:
    async with closing() as (server, _):
        await until(attempts(server, 6))
        # Five pauses of at least 0.1 s, and of 0.05, 0.1, 0.2, 0.4 and 0.8 s.
        assert server.times_s[5] - server.times_s[0] > 1.9


async def test_calls_bring_the_next_attempt_forward() -> None:
    async with closing() as (server, connection):
        await until(attempts(server, 6))
        ended = time.monotonic() + 60
        # The next pause lasts 1.7 s at least; calls cut it to 0.1 s, if the machine is not very busy.
        while min((after - before for before, after in pairwise(server.times_s[5:])), default=60) > 1:
            assert time.monotonic() < ended
            with pytest.raises(TransportError):
                await connection.ask(InferRequest(), time.monotonic() + 1, "r", None)
            await asyncio.sleep(0.01)


async def test_gate_stops_whatever_its_connections_do(tmp_path: Path) -> None:
    """Some instances refuse connections, some accept them and say nothing."""
    (refusing,) = free_ports(1)
    with socket.socket() as mute, running_registry(tmp_path) as registry:
        mute.bind(("127.0.0.1", 0))
        mute.listen(1024)
        registry.publish("digits")
        ports = [mute.getsockname()[1] if number % 3 == 0 else refusing for number in range(DEAD)]
        async with EtcdClient(Connection([registry.etcd])) as client:
            for number, port in enumerate(ports):
                one = {"address": f"127.0.0.1:{port}", "app": "digits", "version": "v1", "id": f"i{number}"}
                key = f"{PREFIX}instance/digits/v1/i{number}"
                await client.put(key, orjson.dumps({**one, "capacity": 8}).decode())
        gate = Gate([registry.address], "--grace", "1")
        gate.start()
        try:
            # Connections open with the first request for their version.
            assert await gate.status("digits", "v1") is grpc.StatusCode.UNAVAILABLE
            gate.terminate()
            assert await asyncio.to_thread(gate.wait, 20) == 0
        finally:
            gate.kill()
