"""Requests that are made to cost much cost little."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc.aio
import pytest

from atserving import transport
from atserving.local.mesh import Mesh
from tests.e2e.client import JSON, Client, image

pytestmark = pytest.mark.asyncio(loop_scope="session")

MANY = 1_300_000
"""About as many of the shortest resources as a body of 20 MiB holds."""
URI = b'{"uri":"data:"}'


def peak_mb(pid: int) -> float:
    """Return the most memory that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", status)
    assert found
    return int(found[1]) / 1024


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


async def cost(mesh: Mesh, attack: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    """Return what an attack costs the gate: CPU seconds, and MB that it never had before."""
    pid = mesh.pids()["gate"]
    before_s, before_mb = cpu_s(pid), peak_mb(pid)
    await attack()
    assert mesh.pids()["gate"] == pid
    return cpu_s(pid) - before_s, peak_mb(pid) - before_mb


BATCH = b'{"op":"/v1/eval/digits","data":' + URI + b"}"
BODIES = {
    "a group": ("/v1/eval/digits", b'{"data":[' + b",".join([URI] * MANY) + b"]}", 400),
    "a batch": ("/v1/batch", b"[" + b",".join([BATCH] * (MANY // 3)) + b"]", 413),
    "a group in a batch": (
        "/v1/batch",
        b'[{"op":"/v1/eval/digits","data":[' + b",".join([URI] * MANY) + b"]}]",
        200,
    ),
    "numbers": ("/v1/batch", b"[" + b"1," * 10_000_000 + b"1]", 400),
}


@pytest.mark.parametrize("kind", BODIES)
async def test_millions_of_resources_as_json(client: Client, mesh: Mesh, kind: str) -> None:
    path, body, status = BODIES[kind]

    async def attack() -> None:
        response = await client.post(path, body, JSON)
        assert response.status == status
        if status == 200:
            (item,) = response.json
            assert item == {"code": 400, "message": "the request has more than 64 resources"}

    spent_s, memory_mb = await cost(mesh, attack)
    # It took 28 s, and 1.1 GB.
    assert spent_s < 3
    assert memory_mb < 300


MESSAGES = {"Eval": b"\x0a\x06digits" + b"\x1a\x00" * 10_400_000, "Batch": b"\x0a\x00" * 10_400_000}


def unchanged(data: bytes) -> bytes:
    return data


@pytest.mark.parametrize("method", MESSAGES)
async def test_millions_of_resources_by_grpc(client: Client, mesh: Mesh, method: str) -> None:
    async with transport.channel(f"127.0.0.1:{mesh.ports.edge}") as channel:
        call = channel.unary_unary(f"/atserving.v1.ServingService/{method}", unchanged, unchanged)

        async def attack() -> None:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call(MESSAGES[method], timeout=60)
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT

        spent_s, memory_mb = await cost(mesh, attack)
    # It took 55 s, and 1.6 GB.
    assert spent_s < 3
    assert memory_mb < 300
    assert (await client.bytes("/v1/eval/digits", image("7.png"))).status == 200
