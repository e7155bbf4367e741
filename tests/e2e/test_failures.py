"""What dies, and what callers notice of it: nothing, where anything can be done."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import grpc.aio
import orjson
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from atserving import transport
from atserving.cli.mesh import Mesh
from atserving.local import examples
from tests.e2e.conftest import Client, etcdctl, image, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

INSTANCES = "/ava/serving/instance/digits/"
BIN = Path(sys.executable).parent


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh() -> AsyncIterator[Mesh]:
    async with Mesh(extra={"registry": ["--lease-ttl", "2s"]}) as mesh:
        yield mesh


@pytest_asyncio.fixture(loop_scope="module")
async def client(mesh: Mesh) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(mesh, session)
        await until(lambda: answers(client_of(mesh, session), "/v1/eval/digits"), "the mesh serves again")


def client_of(mesh: Mesh, session: aiohttp.ClientSession) -> Client:
    return Client(mesh, session)


async def answers(client: Client, path: str) -> bool:
    return (await client.bytes(path, image("1.png"))).status == 200


class Load:
    """Callers that ask without a pause, and what they were answered."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()
        self._changed = asyncio.Event()

    async def ask(self, client: Client, path: str) -> None:
        while True:
            response = await client.bytes(path, image("7.png"))
            good = response.status == 200 and response.best == "seven"
            self.answers["ok" if good else response.body.decode()] += 1
            self._changed.set()

    async def more(self, count: int = 50) -> None:
        """Waits until so many more have been answered."""
        enough = self.answers.total() + count
        async with asyncio.timeout(60):
            while self.answers.total() < enough:
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def load(client: Client, path: str = "/v1/eval/digits", callers: int = 4) -> AsyncIterator[Load]:
    """Steady load while the block runs. Afterwards not one request may have failed."""
    running = Load()
    tasks = [asyncio.create_task(running.ask(client, path)) for _ in range(callers)]
    try:
        await running.more()
        yield running
        await running.more()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert running.answers.keys() == {"ok"}, running.answers


def atserving(mesh: Mesh, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [BIN / "atserving", "release", *arguments, "--registry", mesh.registry]
    return subprocess.run(command, capture_output=True, text=True, check=False)


async def check_config_flows(client: Client, app: str) -> None:
    """A release published now reaches the gate."""

    async def published() -> bool:
        tar = examples.DIGITS[0].path.as_uri()
        run = await asyncio.to_thread(atserving, client.mesh, "publish", app, "v1", tar, "--phase", "production")
        return run.returncode == 0

    async def known() -> bool:
        return (await client.bytes(f"/v1/eval/{app}", b"x")).status == 503

    await until(published, f"{app} can be published")
    await until(known, f"the gate knows {app}")
    etcdctl(client.mesh, "del", f"/ava/serving/eval/{app}/v1")


async def test_requests_go_on_while_etcd_is_down_and_config_flows_again_afterwards(client: Client) -> None:
    async with load(client) as running:
        await asyncio.to_thread(client.mesh.stop_process, "etcd")
        await running.more(200)
        refused = await asyncio.to_thread(atserving, client.mesh, "list")
        assert refused.returncode == 0, "what is known can still be listed"
        client.mesh.start_process("etcd")
        await running.more()
        await check_config_flows(client, "after-stop")


async def test_a_crash_of_etcd_is_not_noticed(client: Client) -> None:
    async with load(client) as running:
        client.mesh.kill_process("etcd")
        await running.more(200)
        await check_config_flows(client, "after-crash")


async def test_a_crash_of_the_registry_is_not_noticed(client: Client) -> None:
    async with load(client) as running:
        client.mesh.kill_process("registry")
        await running.more(200)
        await check_config_flows(client, "after-registry")


async def test_leases_that_ran_out_while_every_registry_was_down_cost_nothing(client: Client) -> None:
    async with load(client) as running:
        await asyncio.to_thread(client.mesh.stop_process, "registry")

        async def none_left() -> bool:
            return not await asyncio.to_thread(etcdctl, client.mesh, "get", "--prefix", "--keys-only", INSTANCES)

        await until(none_left, "the leases have run out")
        client.mesh.start_process("registry")
        await check_config_flows(client, "after-leases")
        await running.more(200)

        async def all_back() -> bool:
            return not await none_left()

        await until(all_back, "the instances are registered again")


async def test_a_malformed_value_is_reported_and_changes_nothing(client: Client) -> None:
    key = "/ava/serving/eval/digits/v1"
    good = etcdctl(client.mesh, "get", "--print-value-only", key).strip()
    async with load(client) as running:
        etcdctl(client.mesh, "put", key, '{"file": 7')
        etcdctl(client.mesh, "put", "/ava/serving/worker/default", '{"timeout": "soon"}')

        async def reported() -> bool:
            said = (await asyncio.to_thread(atserving, client.mesh, "list")).stderr
            return f"malformed: {key}" in said and "malformed: /ava/serving/worker/default: timeout" in said

        await until(reported, "the malformed keys are listed")
        await running.more()
        etcdctl(client.mesh, "put", key, good)
        etcdctl(client.mesh, "del", "/ava/serving/worker/default")

        async def mended() -> bool:
            return "malformed" not in (await asyncio.to_thread(atserving, client.mesh, "list")).stderr

        await until(mended, "nothing is malformed any more")


async def test_a_promotion_and_a_rollback_under_load(client: Client) -> None:
    async def served(version: str) -> bool:
        return (await client.bytes("/v1/eval/digits", image("1.png"))).headers["x-serving-version"] == version

    async with load(client) as running:
        for new, old in (("v2", "v1"), ("v1", "v2")):
            assert atserving(client.mesh, "phase", "digits", new, "production").returncode == 0
            await until(lambda new=new: served(new), f"{new} serves")
            assert atserving(client.mesh, "phase", "digits", old, "staging").returncode == 0
            await running.more()


@asynccontextmanager
async def second_instance(mesh: Mesh) -> AsyncIterator[asyncio.subprocess.Process]:
    """One more evaluator of v1, started by hand, once it is registered."""
    before = len(listed(mesh))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "evaluator", "--app", "digits", "--version", "v1"),
        *("--registry", mesh.registry, "--listen", "127.0.0.1:0"),
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:

        async def registered() -> bool:
            return len(await asyncio.to_thread(listed, mesh)) > before

        await until(registered, "the second instance is registered")
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def listed(mesh: Mesh) -> list[str]:
    """The ids of v1's instances, as `atserving release list` shows them."""
    releases = orjson.loads(atserving(mesh, "list", "--json").stdout)["releases"]
    [v1] = [each for each in releases if (each["release"]["name"], each["release"]["version"]) == ("digits", "v1")]
    return [each["id"] for each in v1.get("instances", [])]


async def test_an_instance_that_is_stopped_loses_nothing_and_exits_0(client: Client) -> None:
    async with load(client, callers=8) as running, second_instance(client.mesh) as second:
        await running.more()
        second.terminate()
        assert await second.wait() == 0
        await running.more()


async def test_an_instance_that_crashes_under_load_loses_nothing(client: Client) -> None:
    async with load(client, callers=8) as running, second_instance(client.mesh) as second:
        await running.more()
        second.kill()
        await second.wait()
        await running.more(200)

        async def gone() -> bool:
            return len(await asyncio.to_thread(listed, client.mesh)) == 1

        await until(gone, "its lease has run out")


async def test_without_an_instance_callers_get_a_503_until_it_is_back(client: Client) -> None:
    client.mesh.kill_process("evaluator-digits-v1")

    async def refused() -> bool:
        response = await client.bytes("/v1/eval/digits/v1", image("1.png"))
        return response.status == 503 and response.json["code"] == 503

    await until(refused, "the version is unavailable")
    await until(lambda: answers(client, "/v1/eval/digits/v1"), "the instance was started again")
    assert (await client.get("/health")).status == 200


async def test_without_a_gate_the_edge_says_so_until_it_is_back(client: Client) -> None:
    await asyncio.to_thread(client.mesh.stop_process, "gate")

    async def says_so() -> bool:
        response = await client.bytes("/v1/eval/digits", image("1.png"))
        assert (response.status, response.json["code"], response.json["message"]) == (503, 503, "no gate is ready")
        return (await client.get("/health")).status == 503

    await until(says_so, "the edge is unhealthy")
    client.mesh.start_process("gate")
    await until(lambda: answers(client, "/v1/eval/digits"), "the gate is back")


async def test_publishing_again_keeps_a_promotion(client: Client) -> None:
    tar = examples.DIGITS[0].path.as_uri()
    assert atserving(client.mesh, "publish", "again", "v1", tar, "--desc", "first").returncode == 0
    assert atserving(client.mesh, "phase", "again", "v1", "production").returncode == 0
    said = atserving(client.mesh, "publish", "again", "v1", tar, "--desc", "second")
    assert (said.returncode, said.stdout) == (0, "again v1 is published, in production\n")
    assert "second" in atserving(client.mesh, "list", "--app", "again").stdout
    other = atserving(client.mesh, "publish", "again", "v1", "file:///other.tar")
    assert other.returncode == 1
    assert "file" in other.stderr
    etcdctl(client.mesh, "del", "/ava/serving/eval/again/v1")


async def serves(port: int) -> bool:
    async with transport.channel(f"127.0.0.1:{port}") as channel:
        try:
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        except grpc.aio.AioRpcError:
            return False
    return bool(health.status == health_pb2.HealthCheckResponse.SERVING)


@pytest.mark.parametrize("stop", ["kill_process", "stop_process"])
async def test_with_two_gates_one_may_go_at_any_time(stop: str) -> None:
    async with Mesh(gates=2) as mesh, aiohttp.ClientSession() as session:
        client = Client(mesh, session)

        async def both_serve() -> bool:
            async with session.get(f"http://127.0.0.1:{mesh.ports.admin}/clusters") as response:
                lines = (await response.text()).splitlines()
            gates = [line for line in lines if line.startswith("gate::") and line.endswith("::health_flags::healthy")]
            return len(gates) == 2 and all([await serves(port) for port in mesh.ports.gates])

        async with load(client, callers=8) as running, load(client, "/v1/eval/digits/v2", callers=2):
            for gate in ("gate", "gate-1"):
                await until(both_serve, "both gates serve, and Envoy knows")
                await asyncio.to_thread(getattr(mesh, stop), gate)
                await running.more(300)
                if stop == "stop_process":
                    mesh.start_process(gate)
