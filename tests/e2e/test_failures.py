"""Processes stop, crash and lose each other, and callers do not notice it wherever that is possible."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import aiohttp
import grpc.aio
import orjson
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from atserving import transport
from atserving.local import commands, examples
from atserving.local.envoy import ADMIN_SOCKET
from atserving.local.mesh import Mesh
from tests.e2e.client import Client, image
from tests.processes import Evaluator, etcdctl, start_evaluator
from tests.waiting import until_async

pytestmark = pytest.mark.asyncio(loop_scope="module")

INSTANCES = "/ava/serving/instance/digits/"
# A loss shows at any rate; requests without a pause would only make everything else slower.
_PAUSE_S = 0.02


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh() -> AsyncIterator[Mesh]:
    async with Mesh(extra={"registry": ["--lease-ttl", "2s"]}) as mesh:
        yield mesh


@pytest_asyncio.fixture(loop_scope="module")
async def client(mesh: Mesh) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(mesh, session)
        await until_async(lambda: answers(Client(mesh, session), "/v1/eval/digits"), what="the mesh serves again")


async def answers(client: Client, path: str) -> bool:
    return (await client.bytes(path, image("1.png"))).status == 200


class Load:
    """Count the responses of callers that each send requests one after the other."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()
        self._rounds: Counter[int] = Counter()
        self._changed = asyncio.Event()

    async def ask(self, client: Client, path: str, caller: int) -> None:
        while True:
            response = await client.bytes(path, image("7.png"))
            good = response.status == 200 and response.best == "seven"
            self.answers["ok" if good else response.body.decode()] += 1
            self._rounds[caller] += 1
            self._changed.set()
            await asyncio.sleep(_PAUSE_S)

    async def more(self, count: int = 50) -> None:
        """Wait until so many more requests were answered."""
        enough = self.answers.total() + count
        async with asyncio.timeout(60):
            while self.answers.total() < enough:
                self._changed.clear()
                await self._changed.wait()

    async def more_for_each(self, count: int = 20) -> None:
        """Wait until every caller has so many more answers."""
        enough = {caller: rounds + count for caller, rounds in self._rounds.items()}
        await until_async(lambda: self._have(enough), what="every caller is answered")

    async def _have(self, enough: dict[int, int]) -> bool:
        return all(self._rounds[caller] >= rounds for caller, rounds in enough.items())


@asynccontextmanager
async def load(client: Client, path: str = "/v1/eval/digits", callers: int = 4) -> AsyncIterator[Load]:
    """Send requests while the block runs, and check afterwards that none failed."""
    running = Load()
    tasks = [asyncio.create_task(running.ask(client, path, number)) for number in range(callers)]
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
    command = [str(commands.BIN / "atserving"), "release", *arguments, "--server", mesh.registry]
    return subprocess.run(command, capture_output=True, text=True, check=False)


async def check_config_flows(client: Client, app: str) -> None:
    """Check that a release published now reaches the gate."""

    async def published() -> bool:
        tar = examples.DIGITS[0].path.as_uri()
        run = await asyncio.to_thread(atserving, client.mesh, "put", app, "v1", tar, "--phase", "production")
        return run.returncode == 0

    async def known() -> bool:
        return (await client.bytes(f"/v1/eval/{app}", b"x")).status == 503

    await until_async(published, what=f"{app} can be published")
    await until_async(known, what=f"the gate knows {app}")
    etcdctl(client.mesh.etcd, "del", f"/ava/serving/eval/{app}/v1")


async def test_requests_succeed_while_etcd_is_down_and_config_flows_again_afterwards(client: Client) -> None:
    async with load(client) as running:
        await client.mesh.stop_process("etcd")
        await running.more(200)
        listing = await asyncio.to_thread(atserving, client.mesh, "list")
        assert listing.returncode == 0, "the registry still lists the releases that it knows"
        client.mesh.start_process("etcd")
        await running.more()
        await check_config_flows(client, "after-stop")


async def test_callers_do_not_notice_a_crash_of_etcd(client: Client) -> None:
    async with load(client) as running:
        client.mesh.kill_process("etcd")
        await running.more(200)
        await check_config_flows(client, "after-crash")


async def test_callers_do_not_notice_a_crash_of_the_registry(client: Client) -> None:
    async with load(client) as running:
        client.mesh.kill_process("registry")
        await running.more(200)
        await check_config_flows(client, "after-registry")


async def test_a_gate_that_crashes_while_no_registry_answers_serves_again(client: Client) -> None:
    mesh = client.mesh

    async def saved() -> bool:
        return INSTANCES.encode() in (mesh.directory / "gate.json").read_bytes()

    async def started() -> bool:
        return "config cache used" in mesh.log("gate")

    await until_async(saved, OSError, what="the gate has saved its config")
    await mesh.stop_process("registry")
    mesh.kill_process("gate")
    await until_async(started, what="the gate has started with the saved config")
    await until_async(lambda: answers(client, "/v1/eval/digits"), what="the gate serves")
    mesh.start_process("registry")
    await check_config_flows(client, "after-cache")


async def test_callers_do_not_notice_that_leases_expired_while_the_registry_was_down(client: Client) -> None:
    async with load(client) as running:
        await client.mesh.stop_process("registry")

        async def none_left() -> bool:
            return not await asyncio.to_thread(etcdctl, client.mesh.etcd, "get", "--prefix", "--keys-only", INSTANCES)

        await until_async(none_left, what="the leases have expired")
        client.mesh.start_process("registry")
        await check_config_flows(client, "after-leases")
        await running.more(200)

        async def all_back() -> bool:
            return not await none_left()

        await until_async(all_back, what="the instances are registered again")


async def test_a_malformed_config_value_is_reported_and_ignored(client: Client) -> None:
    key = "/ava/serving/eval/digits/v1"
    good = etcdctl(client.mesh.etcd, "get", "--print-value-only", key).strip()
    async with load(client) as running:
        etcdctl(client.mesh.etcd, "put", key, '{"file": 7')
        etcdctl(client.mesh.etcd, "put", "/ava/serving/worker/default", '{"timeout": "soon"}')

        async def reported() -> bool:
            errors = (await asyncio.to_thread(atserving, client.mesh, "list")).stderr
            return f"malformed: {key}" in errors and "malformed: /ava/serving/worker/default: timeout" in errors

        await until_async(reported, what="the malformed keys are listed")
        await running.more()
        etcdctl(client.mesh.etcd, "put", key, good)
        etcdctl(client.mesh.etcd, "del", "/ava/serving/worker/default")

        async def repaired() -> bool:
            return "malformed" not in (await asyncio.to_thread(atserving, client.mesh, "list")).stderr

        await until_async(repaired, what="no key is malformed any more")


async def test_a_promotion_and_a_rollback_under_load_lose_no_request(client: Client) -> None:
    async def served(version: str) -> bool:
        return (await client.bytes("/v1/eval/digits", image("1.png"))).headers["x-serving-version"] == version

    async with load(client) as running:
        for new, old in (("v2", "v1"), ("v1", "v2")):
            assert atserving(client.mesh, "promote", "digits", new).returncode == 0
            await until_async(partial(served, new), what=f"{new} serves")
            assert atserving(client.mesh, "demote", "digits", old).returncode == 0
            await running.more()


@asynccontextmanager
async def second_instance(mesh: Mesh) -> AsyncIterator[Evaluator]:
    """Run one more evaluator of v1, started by hand, that is registered."""
    before = len(listed(mesh))
    instance = start_evaluator(mesh.registry, "digits", "v1")
    try:

        async def registered() -> bool:
            return len(await asyncio.to_thread(listed, mesh)) > before

        await until_async(registered, what="the second instance is registered")
        yield instance
    finally:
        instance.kill()


def listed(mesh: Mesh) -> list[str]:
    """Return the ids of v1's instances as `atserving ps` shows them."""
    command = [str(commands.BIN / "atserving"), "ps", "digits", "v1", "-o", "json", "--server", mesh.registry]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return [each["id"] for each in orjson.loads(output)["instances"]]


async def test_an_instance_that_stops_under_load_loses_no_request_and_exits_0(client: Client) -> None:
    async with second_instance(client.mesh) as second, load(client, callers=8) as running:
        await running.more()
        second.terminate()
        assert await second.ended() == 0
        await running.more()


async def test_an_instance_that_crashes_under_load_loses_no_request(client: Client) -> None:
    async with second_instance(client.mesh) as second, load(client, callers=8) as running:
        await running.more()
        second.kill()
        await running.more(200)

        async def deregistered() -> bool:
            return len(await asyncio.to_thread(listed, client.mesh)) == 1

        await until_async(deregistered, what="its lease has expired")


async def test_a_worker_that_is_killed_or_stopped_under_load_keeps_no_request(client: Client) -> None:
    async with second_instance(client.mesh) as second, load(client, callers=8) as running:
        os.kill(second.worker(), signal.SIGKILL)
        await running.more(200)
        await asyncio.to_thread(second.logged, event="instance back")
        worker = second.worker()
        os.kill(worker, signal.SIGSTOP)
        try:
            await running.more_for_each()
        finally:
            # It has not been killed meanwhile.
            os.kill(worker, signal.SIGCONT)


async def test_a_version_without_an_instance_is_a_503_until_it_has_one(client: Client) -> None:
    await client.mesh.stop_process("evaluator-digits-v1")
    response = await client.bytes("/v1/eval/digits/v1", image("1.png"))
    assert (response.status, response.json["code"]) == (503, 503)
    client.mesh.start_process("evaluator-digits-v1")
    await until_async(lambda: answers(client, "/v1/eval/digits/v1"), what="the instance was started again")


async def test_a_version_whose_only_instance_crashed_is_back_soon(client: Client) -> None:
    client.mesh.kill_process("evaluator-digits-v1")

    async def answered() -> bool:
        # Requests wait a second for the instance, which is about what it needs.
        response = await client.bytes("/v1/eval/digits/v1", image("1.png"))
        assert response.status in (200, 503)
        return response.status == 200

    await until_async(answered, what="the instance was started again")
    await until_async(lambda: answers(client, "/v1/eval/digits/v1"), what="the instance was started again")
    assert (await client.get("/health")).status == 200


async def test_the_edge_reports_that_no_gate_is_ready_until_one_is_back(client: Client) -> None:
    await client.mesh.stop_process("gate")

    async def reported() -> bool:
        response = await client.bytes("/v1/eval/digits", image("1.png"))
        assert (response.status, response.json["code"], response.json["message"]) == (503, 503, "no gate is ready")
        return (await client.get("/health")).status == 503

    await until_async(reported, what="the edge is unhealthy")
    client.mesh.start_process("gate")
    await until_async(lambda: answers(client, "/v1/eval/digits"), what="the gate is back")


async def test_publishing_again_keeps_the_phase(client: Client) -> None:
    tar = examples.DIGITS[0].path.as_uri()
    assert atserving(client.mesh, "put", "again", "v1", tar, "--desc", "first").returncode == 0
    assert atserving(client.mesh, "promote", "again", "v1", "--force").returncode == 0
    again = atserving(client.mesh, "put", "again", "v1", tar, "--desc", "second")
    assert (again.returncode, again.stdout) == (0, "again v1 is published, in production\n")
    assert "second" in atserving(client.mesh, "list", "again").stdout
    other = atserving(client.mesh, "put", "again", "v1", "file:///other.tar", "--no-check")
    assert other.returncode == 4
    assert "file" in other.stderr
    etcdctl(client.mesh.etcd, "del", "/ava/serving/eval/again/v1")


async def serves(port: int) -> bool:
    async with transport.channel(f"127.0.0.1:{port}") as channel:
        try:
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        except grpc.aio.AioRpcError:
            return False
    return bool(health.status == health_pb2.HealthCheckResponse.SERVING)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh_of_two_gates() -> AsyncIterator[Mesh]:
    async with Mesh(gates=2) as mesh:
        yield mesh


@pytest.mark.parametrize("stop", ["SIGKILL", "SIGTERM"])
async def test_one_of_two_gates_may_end_at_any_time(stop: str, mesh_of_two_gates: Mesh) -> None:
    mesh = mesh_of_two_gates
    to_admin = aiohttp.UnixConnector(str(mesh.directory / ADMIN_SOCKET))
    async with aiohttp.ClientSession() as session, aiohttp.ClientSession(connector=to_admin) as admin:
        client = Client(mesh, session)

        async def both_serve() -> bool:
            async with admin.get("http://envoy/clusters") as response:
                lines = (await response.text()).splitlines()
            gates = [line for line in lines if line.startswith("gate::") and line.endswith("::health_flags::healthy")]
            return len(gates) == 2 and all([await serves(port) for port in mesh.ports.gates])

        async with load(client, callers=8) as running, load(client, "/v1/eval/digits/v2", callers=2):
            for gate in ("gate", "gate-1"):
                await until_async(both_serve, what="both gates serve, and Envoy considers them healthy")
                if stop == "SIGKILL":
                    mesh.kill_process(gate)
                else:
                    await mesh.stop_process(gate)
                await running.more(300)
                mesh.start_process(gate)
