"""Envoy stays below the memory of its pod, whatever callers leave unfinished, and answers others meanwhile."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from reliability.frames import DATA, HEADERS, frame, http2_headers, http2_start
from reliability.uploads import Uploads
from tests.envoy.rig import EVAL, TYPED_EVAL, Edge, eval_request
from tests.pod_memory import PodMemory, forget_most, most_mib
from tests.waiting import until, until_async

pytestmark = pytest.mark.asyncio(loop_scope="module")

UPLOADS = 60
SMALL_UPLOADS = 100
SMALL_BODY_BYTES = 16 << 10
STILL_BODY_BYTES = 5 << 20
BODY_BYTES = 19 << 20
REST_PERCENT = 20


@pytest.fixture(scope="module")
def memory() -> Iterator[PodMemory]:
    with PodMemory("envoy") as memory:
        yield memory


def patient(bootstrap: Any) -> None:
    """Give a request more time to arrive than a test takes, so that this does not end it."""
    manager = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    assert manager["request_timeout"]
    manager["request_timeout"] = "600s"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def edge(memory: PodMemory) -> AsyncIterator[Edge]:
    async with Edge(gates=3, memory=memory, change=patient) as edge:
        yield edge


@asynccontextmanager
async def bounded(edge: Edge, memory: PodMemory) -> AsyncIterator[None]:
    """Check that what the block leaves open fits the pod, and that others are answered meanwhile."""

    async def at_rest() -> bool:
        return await edge.stat("overload.envoy.resource_monitors.fixed_heap.pressure") < REST_PERCENT

    await until_async(at_rest, what="Envoy has let go of what was before")
    forget_most(edge.envoy)
    yield

    async def answered() -> bool:
        status, body = await edge.ask()
        if status != 200:
            assert (status, body) == (503, {"code": 503, "message": "the edge holds as many requests as it can"})
        return status == 200

    await until_async(answered, what="other callers are answered")
    memory.check(edge.envoy)


async def test_uploads_over_many_connections_are_bounded(edge: Edge, memory: PodMemory) -> None:
    answers: Counter[bytes] = Counter()
    settled = 0
    done = asyncio.Event()

    async def upload() -> None:
        nonlocal settled
        reader, writer = await edge.connect()
        writer.transport.set_write_buffer_limits(1 << 20)
        answer = b""
        try:
            with suppress(ConnectionError):
                writer.write(eval_request(bytes(BODY_BYTES - 1), missing=1))
                await writer.drain()
            settled += 1
            reading = asyncio.create_task(reader.read())
            leaving = asyncio.create_task(done.wait())
            await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
            leaving.cancel()
            reading.cancel()
            with suppress(ConnectionError, asyncio.CancelledError):
                answer = await reading
            answers[answer.partition(b"\r\n")[0]] += 1
        finally:
            writer.close()

    async with bounded(edge, memory):
        uploads = [asyncio.create_task(upload()) for _ in range(UPLOADS)]
        await until(lambda: settled == UPLOADS, what="every upload has been sent or broken off")
    done.set()
    await asyncio.gather(*uploads)
    assert answers.keys() <= {b"", b"HTTP/1.1 503 Service Unavailable"}


async def test_uploads_that_stand_still_leave_memory_to_others(edge: Edge, memory: PodMemory) -> None:
    ended = "http.edge.downstream_rq_idle_timeout"
    before = await edge.stat(ended)
    writers = []

    async def one_more() -> bool:
        _, writer = await edge.connect()
        writers.append(writer)
        with suppress(ConnectionError):
            writer.write(eval_request(bytes(STILL_BODY_BYTES), missing=1))
            await writer.drain()
        return await edge.stat(ended) > before

    async with bounded(edge, memory):
        await until_async(one_more, what="Envoy has ended uploads that stand still")
    for writer in writers:
        writer.transport.abort()


async def test_small_uploads_leave_memory_to_others(edge: Edge, memory: PodMemory) -> None:
    ended = "http.edge.downstream_rq_idle_timeout"
    before = await edge.stat(ended)
    uploads: list[Uploads] = []

    async def some_more() -> bool:
        connection = await edge.connect()
        content_type = "application/octet-stream"
        uploads.append(await Uploads.start(connection, EVAL, content_type, SMALL_UPLOADS, SMALL_BODY_BYTES))
        return await edge.stat(ended) > before

    async with bounded(edge, memory):
        await until_async(some_more, what="Envoy has ended small uploads that stand still")
    for each in uploads:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await each.close()


@pytest.mark.parametrize(
    ("path", "content_type"), [(EVAL, "application/octet-stream"), (TYPED_EVAL, "application/grpc")]
)
async def test_uploads_over_one_connection_are_bounded(
    edge: Edge, memory: PodMemory, path: str, content_type: str
) -> None:
    for gate in edge.gates:
        forget_most(gate)
    before = [most_mib(gate) for gate in edge.gates]
    async with bounded(edge, memory):
        uploads = await Uploads.start(await edge.connect(), path, content_type, UPLOADS, BODY_BYTES)
        await until(uploads.settled, what="every upload has been sent or reset")
        assert uploads.resets
    # A gate never sees a request that is not whole.
    assert all(most_mib(gate) < least + 16 for gate, least in zip(edge.gates, before, strict=True))
    await uploads.close()


async def test_answers_that_nobody_reads_are_bounded(edge: Edge, memory: PodMemory) -> None:
    connections = []
    resets = "envoy.overload_actions.reset_high_memory_stream.count"
    before = await edge.stat(resets)
    async with bounded(edge, memory):
        for _ in range(40):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connections.append(connection)
            await asyncio.to_thread(connection.connect, ("127.0.0.1", edge.ports.edge))
            connection.sendall(eval_request(b"large"))

        async def reset() -> bool:
            return await edge.stat(resets) > before

        await until_async(reset, what="Envoy has broken off the largest answers")
    for connection in connections:
        connection.close()


async def test_answers_whose_windows_stay_closed_are_bounded(edge: Edge, memory: PodMemory) -> None:
    resets = "envoy.overload_actions.reset_high_memory_stream.count"
    before = await edge.stat(resets)
    async with bounded(edge, memory):
        _, writer = await edge.connect()
        writer.write(http2_start())
        for stream in range(1, 80, 2):
            writer.write(frame(HEADERS, 4, stream, http2_headers(EVAL, "application/octet-stream")))
            writer.write(frame(DATA, 1, stream, b"large"))

        async def reset() -> bool:
            return await edge.stat(resets) > before

        await until_async(reset, what="Envoy has broken off the largest answers")
    writer.transport.abort()


def short_of_memory(bootstrap: Any) -> None:
    """Let Envoy have less memory than it takes from the start."""
    (heap,) = [
        monitor["typed_config"]
        for monitor in bootstrap["overload_manager"]["resource_monitors"]
        if monitor["name"].endswith("fixed_heap")
    ]
    assert heap["max_heap_size_bytes"]
    heap["max_heap_size_bytes"] = 1 << 20


def short_of_memory_and_time(bootstrap: Any) -> None:
    """Let requests stand still for a moment only, and let operators send theirs in a second."""
    short_of_memory(bootstrap)
    (timers,) = [
        action["typed_config"]["timer_scale_factors"]
        for action in bootstrap["overload_manager"]["actions"]
        if action["name"].endswith("reduce_timeouts")
    ]
    (idle,) = [timer for timer in timers if timer["timer"] == "HTTP_DOWNSTREAM_STREAM_IDLE"]
    idle["min_timeout"] = "0.1s"
    operators = bootstrap["static_resources"]["listeners"][1]["filter_chains"][0]["filters"][0]["typed_config"]
    assert operators["request_timeout"]
    operators["request_timeout"] = "1s"


async def test_operators_keep_their_time_while_memory_is_short() -> None:
    async with Edge(change=short_of_memory_and_time) as edge:
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.ports.operators)
        head = "POST /v1/apps/a:split HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: 9\r\n\r\n".encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
        writer.close()
        assert await edge.stat("http.operators.downstream_rq_timeout") == 1
        assert await edge.stat("http.operators.downstream_rq_idle_timeout") == 0


async def test_an_envoy_that_is_short_of_memory_is_not_ready_but_lives() -> None:
    async with Edge(change=short_of_memory) as edge, aiohttp.ClientSession() as session:

        async def status(url: str) -> int:
            async with session.get(url) as response:
                return response.status

        async def refusing() -> bool:
            return await status(f"{edge.url}/health") == 503

        await until_async(refusing, what="Envoy refuses requests")
        assert (await edge.ask())[0] == 503
        for path in ("/live", "/metrics"):
            assert await status(f"http://127.0.0.1:{edge.ports.ops}{path}") == 200
