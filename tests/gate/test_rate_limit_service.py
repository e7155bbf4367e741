"""Limits that a rate limit service makes exact over all gates, and goes without while it is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from structlog.testing import capture_logs

from atserving.config import AppMetadata, validate
from atserving.errors import ResourceExhausted
from atserving.v1.ratelimit_pb2 import RateLimitUnit
from gate import edge, rate_limit_service
from gate.admission import Caller
from gate.batch import run_batch
from gate.dispatch import CallContext, Dispatcher
from gate.metrics import Metrics
from gate.rate_limit_service import RateLimitService, in_unit
from tests.gate.rate_limit_server import RateLimitServer, running_server
from tests.gate.test_dispatch import FULL, Evaluator, Mesh, running_mesh, task
from tests.processes import Gate, running_registry
from tests.waiting import until

METADATA = "/ava/serving/app/metadata/app"
ADA, PAT = Caller(1, proven=True), Caller(2, proven=True)
ENOUGH_S = 60.0


@pytest.fixture
async def server() -> AsyncIterator[RateLimitServer]:
    async with running_server() as server:
        yield server


@pytest.fixture
def evaluator() -> Evaluator:
    return Evaluator("a")


@pytest.fixture
async def mesh(server: RateLimitServer, evaluator: Evaluator) -> AsyncIterator[Mesh]:
    async with running_mesh() as mesh:
        service = RateLimitService(f"127.0.0.1:{server.port}", timeout_s=ENOUGH_S)
        mesh.dispatcher = Dispatcher(mesh.router, mesh.synced, mesh.shadows, service)
        await mesh.add(evaluator)
        yield mesh
        await service.close()


def limit(mesh: Mesh, **limits: float) -> None:
    mesh.put(METADATA, validate(AppMetadata, limits))


async def let_in(mesh: Mesh, count: int, caller: Caller = ADA, body: bytes = b"") -> int:
    """Return how many of some requests are let in, one after another."""
    passed = 0
    for _ in range(count):
        asked = task()
        asked.request.data[0].body = body or b"image"
        try:
            await mesh.dispatcher.eval(asked, CallContext("r", caller))
            passed += 1
        except ResourceExhausted:
            pass
    return passed


def service_of(mesh: Mesh) -> RateLimitService:
    service = mesh.dispatcher._rate_limits
    assert service
    return service


async def test_the_sum_over_two_gates_is_exact(tmp_path: Path, server: RateLimitServer) -> None:
    """Two processes, one after the other and both at once: each alone would let in as many as both may."""
    with running_registry(tmp_path) as registry:
        registry.publish("app")
        registry.put("app/metadata/app", {"max_requests_per_second": 20})
        gates = [
            Gate(
                [registry.address],
                *("--rate-limit-service", f"127.0.0.1:{server.port}", "--rate-limit-timeout", "60"),
            )
            for _ in range(2)
        ]
        try:
            for gate in gates:
                gate.start()
            for gate in gates:
                await asyncio.to_thread(gate.logged, event="service ready")
            found = [await gates[0].status("app") for _ in range(5)]
            found += await asyncio.gather(*(gate.status("app") for gate in gates for _ in range(18)))
            # Who passes the limits finds no instance.
            assert found.count(grpc.StatusCode.UNAVAILABLE) == 20
            assert found.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 21
        finally:
            for gate in gates:
                gate.kill()


async def test_each_caller_of_each_app_counts_alone(mesh: Mesh, server: RateLimitServer) -> None:
    limit(mesh, max_requests_per_second=3)
    assert await let_in(mesh, 3) == await let_in(mesh, 3, PAT) == await let_in(mesh, 3, Caller()) == 3
    assert server.counts == {("app", "requests", uid): 3 for uid in ("1", "2", "anonymous")}
    (descriptor,) = server.requests[0].descriptors
    assert [entry.key for entry in descriptor.entries] == ["app", "limit", "uid"]
    assert (descriptor.limit.requests_per_unit, descriptor.limit.unit) == (3, RateLimitUnit.SECOND)


async def test_what_needs_no_question_asks_none(mesh: Mesh, server: RateLimitServer) -> None:
    assert await let_in(mesh, 5) == 5
    limit(mesh, max_in_flight=5)
    assert await let_in(mesh, 5) == 5
    assert not server.requests
    # The gate's own limit comes first.
    limit(mesh, max_requests_per_second=0.001)
    assert await let_in(mesh, 5) == 1
    assert len(server.requests) == 1


async def test_a_refusal_says_when_to_come_again_and_spares_the_service(mesh: Mesh, server: RateLimitServer) -> None:
    limit(mesh, max_requests_per_second=100.5)
    server.counts["app", "requests", "1"] = 6030
    with pytest.raises(ResourceExhausted, match="more than 6030 requests a minute, which is its limit over") as refused:
        await mesh.dispatcher.eval(task(), CallContext("r", ADA))
    assert dict(edge.rate_limit(refused.value)) == {
        "ratelimit-policy": '"requests";q=6030;w=60',
        "ratelimit": '"requests";r=0;t=30',
    }
    assert await let_in(mesh, 3) == 0
    # It would refuse until the window ends.
    assert len(server.requests) == 1
    assert service_of(mesh).asked == {"refused": 1}
    # Another limit is another window.
    limit(mesh, max_requests_per_second=200.5)
    assert await let_in(mesh, 1) == 1


async def test_windows_of_a_second_are_asked_for_each_time(mesh: Mesh, server: RateLimitServer) -> None:
    """Their end is rounded to more than they last."""
    server.left_s = 1
    limit(mesh, max_requests_per_second=100)
    server.counts["app", "requests", "1"] = 100
    assert await let_in(mesh, 2) == 0
    server.counts.clear()
    assert await let_in(mesh, 1) == 1


async def test_bytes_count_by_their_number(mesh: Mesh, server: RateLimitServer) -> None:
    limit(mesh, max_bytes_per_minute=100_000)
    assert await let_in(mesh, 1, body=bytes(40_000)) == 1
    assert 40_000 <= server.counts["app", "bytes", "1"] < 40_100
    server.counts["app", "bytes", "1"] += 40_000
    asked = task()
    asked.request.data[0].body = bytes(40_000)
    with pytest.raises(ResourceExhausted, match="more than 100000 bytes a minute, which is its limit over all gates"):
        await mesh.dispatcher.eval(asked, CallContext("r", ADA))


async def test_many_bytes_count_in_larger_units(mesh: Mesh, server: RateLimitServer) -> None:
    limit(mesh, max_bytes_per_minute=1 << 42)
    assert await let_in(mesh, 1, body=bytes(2_000_000)) == 1
    # A service counts in 32 bits.
    (descriptor,) = server.requests[0].descriptors
    assert descriptor.limit.requests_per_unit == (1 << 42) // (1 << 20)
    assert server.counts["app", "bytes", "1"] == 2


@pytest.mark.parametrize(
    ("per_second", "count", "unit"),
    [
        (1e6, 1_000_000, "SECOND"),
        (1, 1, "SECOND"),
        (2.5, 150, "MINUTE"),
        (0.1, 6, "MINUTE"),
        (1 / 3, 20, "MINUTE"),
        (0.01, 36, "HOUR"),
        (0.001, 86, "DAY"),
        (1e-9, 1, "DAY"),
    ],
)
def test_a_rate_is_a_whole_number_in_some_unit(per_second: float, count: int, unit: str) -> None:
    assert in_unit(per_second) == (count, RateLimitUnit.Value(unit))


async def test_limits_of_the_gate_go_on_without_the_service(
    mesh: Mesh, server: RateLimitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(mesh, max_requests_per_second=1e6)
    service = service_of(mesh)
    await server.stop()
    monkeypatch.setattr(rate_limit_service, "_PAUSE_S", ENOUGH_S)
    with capture_logs() as logs:
        assert await let_in(mesh, 20) == 20
    # It has said so once, and does not ask again for a while.
    assert [each["event"] for each in logs if each["event"].startswith("rate")] == ["rate limit service lost"]
    assert service.asked == {"failed": 5, "skipped": 15}
    limit(mesh, max_requests_per_second=0.001)
    assert await let_in(mesh, 5, PAT) == 1
    text, _ = await Metrics(mesh.shadows, mesh.dispatcher.turns, service).page("")
    assert b'atserving_gate_rate_limit_questions_total{outcome="failed"} 5.0' in text
    await server.start()
    service._paused_until_s = 0.0
    limit(mesh, max_requests_per_second=1000)
    with capture_logs() as logs:
        # Its channel connects again in its own time.
        while not server.requests:
            await let_in(mesh, 1)
            service._paused_until_s = 0.0
            await asyncio.sleep(0.01)
        assert "rate limit service back" in [each["event"] for each in logs]


async def test_a_service_that_does_not_answer_holds_nobody_up(mesh: Mesh, server: RateLimitServer) -> None:
    limit(mesh, max_requests_per_second=100)
    server.answers.clear()
    service = service_of(mesh)
    service._timeout_s = 0.001
    with capture_logs() as logs:
        assert await let_in(mesh, 3) == 3
    assert service.asked["failed"] == 3
    assert [each["reason"] for each in logs if each["event"] == "rate limit service lost"] == [
        "no answer within 0.001 s"
    ]
    server.answers.set()


@pytest.mark.parametrize(
    ("domain", "answer", "reason"),
    [
        ("other", b"", "it counts nothing: its config needs a file with the line 'domain: atserving'"),
        ("atserving", b"\xff", "its answer is malformed"),
    ],
)
async def test_a_service_that_answers_wrongly_is_as_good_as_away(
    mesh: Mesh, server: RateLimitServer, domain: str, answer: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_limit_service, "_START_S", ENOUGH_S)
    server.domain, server.answer = domain, answer
    limit(mesh, max_requests_per_second=100)
    with capture_logs() as logs:
        await service_of(mesh).check()
        assert await let_in(mesh, 1) == 1
    (lost,) = (each for each in logs if each["event"] == "rate limit service lost")
    assert lost["reason"] == reason
    assert service_of(mesh).asked == {"failed": 2}


async def test_a_change_while_the_service_is_asked_harms_no_request(mesh: Mesh, server: RateLimitServer) -> None:
    limit(mesh, max_requests_per_second=100, max_bytes_per_minute=100_000)
    server.answers.clear()
    first = asyncio.create_task(let_in(mesh, 1))
    await until(lambda: server.requests)
    # The next request forgets what the old limits knew, and the first has not asked for its bytes.
    limit(mesh, max_requests_per_second=100, max_bytes_per_minute=100_000, max_in_flight=1)
    assert await let_in(mesh, 1) == 0
    server.answers.set()
    assert await first == 1


async def test_an_endless_window_of_a_service_ends(mesh: Mesh, server: RateLimitServer) -> None:
    server.left_s = 1 << 40
    server.counts["app", "requests", "1"] = 100
    limit(mesh, max_requests_per_second=100)
    with pytest.raises(ResourceExhausted) as refused:
        await mesh.dispatcher.eval(task(), CallContext("r", ADA))
    assert refused.value.retry_after_s == 1


async def test_a_task_that_tries_again_counts_once(mesh: Mesh, server: RateLimitServer, evaluator: Evaluator) -> None:
    limit(mesh, max_requests_per_second=1000, max_bytes_per_minute=10_000_000)
    evaluator.error = FULL
    asked = 0

    def recovers() -> None:
        nonlocal asked
        asked += 1
        if asked > 3:
            evaluator.error = None

    evaluator.on_request = recovers
    results = await run_batch(mesh.dispatcher, [task() for _ in range(10)], CallContext("b", ADA), 2, mesh.held)
    assert not [each for each in results if isinstance(each, Exception)]
    assert asked == 13
    assert server.counts["app", "requests", "1"] == 10
    assert server.counts["app", "bytes", "1"] == sum(task().size() for _ in range(10))
