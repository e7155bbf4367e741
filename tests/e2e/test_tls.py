"""A whole mesh whose processes speak TLS with each other: it answers, keeps others out, and renews its certificates."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import grpc
import grpc.aio
import pytest
import pytest_asyncio

from atserving import transport
from atserving.local import commands, examples
from atserving.local.authority import Authority
from atserving.local.mesh import Mesh
from atserving.tls import ENVOY, EVALUATOR, GATE, OPERATOR, REGISTRY, Tls
from atserving.v1 import evaluator_pb2, evaluator_pb2_grpc, serving_pb2, serving_pb2_grpc
from tests.e2e.client import Client, image, padded
from tests.monitoring.rules import alerts
from tests.prometheus import Prometheus
from tests.waiting import PATIENCE_S, until, until_async

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

SERVICES = ("registry", "gate", "gate-1", "evaluator-digits-v1")
DIGITS = f"{EVALUATOR}/digits"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh() -> AsyncIterator[Mesh]:
    drains = {name: ["--drain", "2"] for name in ("gate", "gate-1")}
    async with Mesh(serves=examples.DIGITS[:1], gates=2, tls=True, extra=drains) as mesh:
        yield mesh


@pytest_asyncio.fixture(loop_scope="module")
async def client(mesh: Mesh) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(mesh, session)


def files(mesh: Mesh, role: str) -> Tls:
    assert mesh.authority
    return Tls(mesh.authority.files(role))


async def test_requests_of_every_size_are_answered(client: Client) -> None:
    for body in (image("7.png"), padded(image("7.png"), 700_000), padded(image("7.png"), 9_000_000)):
        response = await client.bytes("/v1/eval/digits", body)
        assert (response.status, response.best) == (200, "seven")


async def eval_status(address: str, tls: Tls | None) -> grpc.StatusCode:
    """Return how an eval ends at a gate that is asked directly."""
    request = serving_pb2.EvalRequest(app="digits", data=[serving_pb2.Resource(body=image("7.png"))])
    async with transport.channel(address, tls=tls, role=GATE) as channel:
        try:
            await serving_pb2_grpc.ServingServiceStub(channel).Eval(request, timeout=PATIENCE_S)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


async def test_gates_take_requests_of_envoy_alone(mesh: Mesh, tmp_path: Path) -> None:
    gate = f"127.0.0.1:{mesh.ports.gates[0]}"
    assert await eval_status(gate, files(mesh, ENVOY)) is grpc.StatusCode.OK
    for role in (GATE, REGISTRY, DIGITS, f"{OPERATOR}/local", "etcd"):
        assert await eval_status(gate, files(mesh, role)) is grpc.StatusCode.PERMISSION_DENIED, role
    for outsider in (None, Tls(Authority(tmp_path).issue(ENVOY))):
        assert await eval_status(gate, outsider) is grpc.StatusCode.UNAVAILABLE


async def test_instances_take_calls_of_gates_and_registries_alone(mesh: Mesh) -> None:
    at = json.loads(
        next(line for line in mesh.log("evaluator-digits-v1").splitlines() if "instance registered" in line)
    )
    answers = {}
    for role in (GATE, REGISTRY, ENVOY, DIGITS, f"{OPERATOR}/local"):
        async with transport.channel(at["address"], tls=files(mesh, role), role=EVALUATOR) as channel:
            try:
                await evaluator_pb2_grpc.EvaluatorServiceStub(channel).GetLoad(
                    evaluator_pb2.GetLoadRequest(), timeout=PATIENCE_S
                )
                answers[role] = True
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.PERMISSION_DENIED
                answers[role] = False
    assert {role for role, answer in answers.items() if answer} == {GATE, REGISTRY}


async def test_etcd_takes_registries_alone(mesh: Mesh) -> None:
    def reads(role: str, within: str) -> bool:
        assert mesh.authority
        own = mesh.authority.files(role)
        tls = ["--cacert", str(own.ca), "--cert", str(own.cert), "--key", str(own.key)]
        program = [str(commands.BIN / "etcdctl"), "--endpoints", f"https://{mesh.etcd}", "--command-timeout", within]
        command = [*program, *tls, "get", "x"]
        return subprocess.run(command, capture_output=True, check=False, timeout=PATIENCE_S).returncode == 0

    assert await asyncio.to_thread(reads, REGISTRY, "60s")
    assert not await asyncio.to_thread(reads, DIGITS, "1s")


async def test_gates_believe_envoy_without_a_key_of_the_edge(mesh: Mesh) -> None:
    tls = files(mesh, f"{OPERATOR}/local").files
    program = [str(commands.BIN / "atserving"), "access", "set", "digits", "--server", mesh.registry]

    def set_(*rules: str) -> None:
        subprocess.run([*program, *rules, *commands.tls(tls)], check=True, capture_output=True, timeout=PATIENCE_S)

    async def known(tls: Tls, uid: str) -> grpc.StatusCode:
        request = serving_pb2.EvalRequest(app="digits", data=[serving_pb2.Resource(body=image("7.png"))])
        async with transport.channel(f"127.0.0.1:{mesh.ports.gates[0]}", tls=tls, role=GATE) as channel:
            try:
                metadata = (("x-serving-uid", uid),)
                await serving_pb2_grpc.ServingServiceStub(channel).Eval(request, metadata=metadata, timeout=PATIENCE_S)
            except grpc.aio.AioRpcError as error:
                return error.code()
        return grpc.StatusCode.OK

    envoy = files(mesh, ENVOY)
    await asyncio.to_thread(set_, "public=false", "owner=42")

    async def closed() -> bool:
        return await eval_status(f"127.0.0.1:{mesh.ports.gates[0]}", envoy) is grpc.StatusCode.UNAUTHENTICATED

    try:
        await until_async(closed)
        assert await known(envoy, "42") is grpc.StatusCode.OK
        assert await known(envoy, "41") is grpc.StatusCode.PERMISSION_DENIED
        assert await known(files(mesh, GATE), "42") is grpc.StatusCode.PERMISSION_DENIED
    finally:
        await asyncio.to_thread(set_, "public=true")


async def test_doctor_and_ps_work_over_tls(mesh: Mesh) -> None:
    tls = commands.tls(files(mesh, f"{OPERATOR}/local").files)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = [str(commands.BIN / "atserving"), *arguments, "--server", mesh.registry, *tls]
        return subprocess.run(program, capture_output=True, text=True, check=False, timeout=PATIENCE_S)

    found = await asyncio.to_thread(run, "doctor", "--edge", mesh.url)
    assert (found.returncode, found.stderr) == (0, "")
    listed = await asyncio.to_thread(run, "ps", "-o", "json")
    (instance,) = json.loads(listed.stdout)["instances"]
    assert "unreachable" not in instance
    assert "load" in instance


async def test_alerts_of_certificates_read_those_of_every_process(mesh: Mesh, tmp_path: Path) -> None:
    async with Prometheus(tmp_path, mesh.targets()) as prometheus:
        await prometheus.until_all_up()
        for alert in (each for each in alerts() if "Certificate" in each.name):
            assert await prometheus.query(alert.expression) == []
            # As if those of a few months ended soon.
            sooner = re.sub(r"< [\d.]+ \*", "< 1000 *", alert.expression)
            await prometheus.until(f"count(group by (job) ({sooner})) == 4")


async def test_operators_reach_the_registry_through_envoy(mesh: Mesh) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{mesh.operators_url}/v1/apps/digits") as response:
        assert response.status == 200


@asynccontextmanager
async def load(client: Client) -> AsyncIterator[list[int]]:
    """Call all the time; collect the statuses."""
    statuses: list[int] = []

    async def call() -> None:
        while True:
            statuses.append((await client.bytes("/v1/eval/digits", image("7.png"))).status)

    callers = [asyncio.create_task(call()) for _ in range(4)]
    try:
        yield statuses
    finally:
        for each in callers:
            each.cancel()
        ends = await asyncio.gather(*callers, return_exceptions=True)
        assert {type(end) for end in ends} == {asyncio.CancelledError}


async def test_renewing_all_certificates_and_the_authority_loses_no_request(mesh: Mesh, client: Client) -> None:
    assert mesh.authority
    async with load(client) as statuses:
        # After the second turn nobody trusts the first authority any more.
        for _ in range(2):
            mesh.authority = Authority(mesh.authority.folder, renew=True)
            mesh.renew_certificates()
        # It reads its certificate again, but not its authorities.
        await restart(mesh, "etcd", "registry", "etcd watch started")
        # Whoever is started again makes new connections, and the others take them.
        await restart(mesh, "registry", "registry", "service ready")
        for name in ("gate", "gate-1"):
            await restart(mesh, name, name, "request finished")
    assert set(statuses) == {200}
    for name in SERVICES:
        assert "certificates unchanged" not in mesh.log(name)
    tls = commands.tls(files(mesh, f"{OPERATOR}/local").files)
    program = [str(commands.BIN / "atserving"), "doctor", "--server", mesh.registry, "--edge", mesh.url, *tls]

    async def healthy() -> bool:
        run = await asyncio.to_thread(subprocess.run, program, capture_output=True, check=False, timeout=PATIENCE_S)
        return run.returncode == 0

    await until_async(healthy)


async def test_each_service_stops_as_without_tls(mesh: Mesh) -> None:
    await mesh.stop_process("evaluator-digits-v1")
    assert "service stopped" in mesh.log("evaluator-digits-v1")
    for name in SERVICES:
        assert "Traceback" not in mesh.log(name)
        assert '"level":"error"' not in mesh.log(name)


async def restart(mesh: Mesh, name: str, witness: str, line: str) -> None:
    """Start a process again, and wait until a process logs a line."""
    await mesh.stop_process(name)
    before = mesh.log(witness).count(line)
    mesh.start_process(name)
    await until(lambda: mesh.log(witness).count(line) > before, what=f"{name} serves again")
