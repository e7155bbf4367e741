"""Envoy stays below the memory of its pod, whatever callers leave unfinished, and answers others meanwhile."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import yaml

from atserving.local.examples import ROOT
from tests.envoy.rig import (
    EVAL,
    TYPED_EVAL,
    Edge,
    eval_request,
    forget_most,
    http2_headers,
    http2_start,
    most_mib,
)
from tests.envoy.uploads import Uploads
from tests.frames import DATA, HEADERS, frame
from tests.waiting import until, until_async

pytestmark = pytest.mark.asyncio(loop_scope="module")

UPLOADS = 60
BODY_BYTES = 19 << 20
# Less than the limit of the pod by the memory of the kernel's buffers.
SPARE_MIB = 128
REST_PERCENT = 20


def pod_mib() -> int:
    """Return the memory limit of Envoy's pod."""
    for document in yaml.safe_load_all((ROOT / "k8s" / "base" / "envoy.yaml").read_text()):
        if document["kind"] == "Deployment":
            [container] = document["spec"]["template"]["spec"]["containers"]
            limit = container["resources"]["limits"]["memory"]
            assert limit.endswith("Gi")
            return int(limit.removesuffix("Gi")) << 10
    raise AssertionError("no deployment")


@asynccontextmanager
async def bounded(edge: Edge) -> AsyncIterator[None]:
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
    assert most_mib(edge.envoy) < pod_mib() - SPARE_MIB


async def test_uploads_over_many_connections_are_bounded(edge: Edge) -> None:
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

    async with bounded(edge):
        uploads = [asyncio.create_task(upload()) for _ in range(UPLOADS)]
        await until(lambda: settled == UPLOADS, what="every upload has been sent or broken off")
    done.set()
    await asyncio.gather(*uploads)
    assert answers.keys() <= {b"", b"HTTP/1.1 503 Service Unavailable"}


@pytest.mark.parametrize(
    ("path", "content_type"), [(EVAL, "application/octet-stream"), (TYPED_EVAL, "application/grpc")]
)
async def test_uploads_over_one_connection_are_bounded(edge: Edge, path: str, content_type: str) -> None:
    for gate in edge.gates:
        forget_most(gate)
    before = [most_mib(gate) for gate in edge.gates]
    async with bounded(edge):
        uploads = await Uploads.start(edge, path, content_type, UPLOADS, BODY_BYTES)
        await until(uploads.settled, what="every upload has been sent or reset")
        assert uploads.resets
    # A gate never sees a request that is not whole.
    assert all(most_mib(gate) < least + 16 for gate, least in zip(edge.gates, before, strict=True))
    await uploads.close()


async def test_answers_that_nobody_reads_are_bounded(edge: Edge) -> None:
    connections = []
    resets = "envoy.overload_actions.reset_high_memory_stream.count"
    before = await edge.stat(resets)
    async with bounded(edge):
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


async def test_answers_whose_windows_stay_closed_are_bounded(edge: Edge) -> None:
    resets = "envoy.overload_actions.reset_high_memory_stream.count"
    before = await edge.stat(resets)
    async with bounded(edge):
        _, writer = await edge.connect()
        writer.write(http2_start())
        for stream in range(1, 80, 2):
            writer.write(frame(HEADERS, 4, stream, http2_headers(EVAL, "application/octet-stream")))
            writer.write(frame(DATA, 1, stream, b"large"))

        async def reset() -> bool:
            return await edge.stat(resets) > before

        await until_async(reset, what="Envoy has broken off the largest answers")
    writer.transport.abort()
