"""The health service of each process: alive from its start, ready only when it can serve."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from atserving import transport
from atserving.admin.v1 import admin_pb2, admin_pb2_grpc
from atserving.local import examples
from atserving.local.ports import free_ports
from atserving.v1 import serving_pb2, serving_pb2_grpc
from tests.processes import Process, Registry, cluster
from tests.waiting import until, until_async

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NOWHERE = "127.0.0.1:1"


async def health(address: str, service: str = "") -> int:
    async with transport.channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, wait_for_ready=True, timeout=30)
        return int(answer.status)


async def page(url: str) -> tuple[int, str]:
    """Return the status and the text of a page."""
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text()


@asynccontextmanager
async def running(process: Process) -> AsyncIterator[Process]:
    process.start()
    try:
        yield process
    finally:
        process.kill()


def service(directory: Path, name: str, *flags: str) -> tuple[Process, str]:
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    return Process([sys.executable, "-m", name, "--listen", address, *flags], directory / f"{name}.log"), address


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("registry", ["--etcd", NOWHERE]),
        ("gate", ["--registry", NOWHERE, "--wait", "0"]),
        ("evaluator", ["--app", "a", "--version", "v1", "--registry", NOWHERE, "--wait", "0"]),
    ],
)
async def test_a_process_that_waits_for_others_is_alive_not_ready_and_stops_on_sigterm(
    name: str, flags: list[str], tmp_path: Path
) -> None:
    (http,) = free_ports(1)
    process, address = service(tmp_path, name, *flags, "--http", f"127.0.0.1:{http}")
    async with running(process):
        assert await health(address, transport.LIVE) == SERVING
        assert await health(address) == NOT_SERVING
        assert await page(f"http://127.0.0.1:{http}/live") == (200, "live\n")
        assert await page(f"http://127.0.0.1:{http}/ready") == (503, "not ready\n")
        process.send(signal.SIGTERM)
        assert await process.ended() == 0


async def test_a_gate_without_a_config_does_not_report_unknown_apps(tmp_path: Path) -> None:
    process, address = service(tmp_path, "gate", "--registry", NOWHERE, "--wait", "0")
    async with running(process):
        await health(address)
        async with transport.channel(address) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="this gate has no config yet") as refused:
                await serving_pb2_grpc.ServingServiceStub(channel).Eval(serving_pb2.EvalRequest(app="digits"))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_an_instance_is_ready_when_it_is_registered_and_stays_ready_without_etcd(tmp_path: Path) -> None:
    (etcd,) = cluster(tmp_path, ["one"])
    registry = Registry(tmp_path, [etcd.address])
    process, address = service(
        tmp_path, "evaluator", "--app", "digits", "--version", "v1", "--registry", registry.address
    )
    async with running(etcd), running(registry):
        await etcd.ready()
        etcd.ctl("put", "/ava/serving/eval/digits/v1", f'{{"file": "{examples.DIGITS[0].path.as_uri()}"}}')
        await until_async(lambda: is_listed(registry.address), grpc.aio.AioRpcError)
        etcd.kill()
        async with running(process):
            await until(lambda: "registration failed" in process.log_text())
            assert await health(address, transport.LIVE) == SERVING
            assert await health(address) == NOT_SERVING
            etcd.start()
            await until_async(lambda: ready(address))
            etcd.kill()
            await until(lambda: process.log_text().count("registration failed") == 2)
            assert await health(address) == SERVING


async def ready(address: str) -> bool:
    return bool(await health(address) == SERVING)


async def is_listed(registry: str) -> bool:
    async with transport.channel(registry) as channel:
        listed = await admin_pb2_grpc.AdminServiceStub(channel).ListReleases(admin_pb2.ListReleasesRequest(app="-"))
    return len(listed.releases) == 1


async def test_a_process_ends_while_a_lookup_hangs(tmp_path: Path) -> None:
    _, address = service(tmp_path, "gate")
    never = "import socket, threading; socket.getaddrinfo = lambda *_, **__: threading.Event().wait()"
    start = "from atserving.cli import service; from gate.__main__ import main; service.run(main, 'gate')"
    flags = ["--registry", "registry:1", "--wait", "0", "--listen", address]
    process = Process([sys.executable, "-c", f"{never}; {start}", *flags], tmp_path / "gate.log")
    async with running(process):
        assert await health(address, transport.LIVE) == SERVING
        process.send(signal.SIGTERM)
        assert await process.ended() == 0


@pytest.mark.parametrize("name", ["registry..cluster", "r" * 70])
async def test_an_invalid_host_name_is_reported(name: str, tmp_path: Path) -> None:
    process, _ = service(tmp_path, "gate", "--registry", f"{name}:1", "--wait", "0.5")
    async with running(process):
        assert await process.ended() == 1
        assert f"gate: no config within 0.5 s: registry {name}:1: " in process.log_text()
