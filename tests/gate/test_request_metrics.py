"""A gate's metrics tell which app, version and instance is slow, failing or refused, and why, in few series."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.api import httpbody_pb2
from msgspec.structs import replace

from atserving.config import AppMetadata, AppRouting, Release, app_routing_key, release_key, validate
from atserving.counting import MAX_REQUEST_BYTES
from atserving.errors import ServingError
from atserving.grpc_server import Server
from atserving.held import HeldBytes
from atserving.transport import channel
from atserving.v1 import authorization_pb2, edge_pb2, evaluator_pb2, serving_pb2
from gate import authorization, connection, pace, request_counts, turns
from gate.__main__ import _tend
from gate.admission import Caller
from gate.authorization import Authorization
from gate.batch import run_batch
from gate.caller_keys import CallerKeys
from gate.callers import Callers
from gate.dispatch import CallContext
from gate.metrics import Metrics
from gate.request_counts import REFUSALS, RETRIES, SECONDS, RequestCounts
from gate.request_metrics import RequestMetrics
from gate.router import EJECT_S
from gate.server import EdgeService, ServingService
from tests.gate.scrapes import Scrape
from tests.gate.test_away import AWAY, set_away
from tests.gate.test_dispatch import DRAINING, FULL, Evaluator, Mesh, running_mesh, task
from tests.metric_text import OPENMETRICS
from tests.waiting import until, until_async

BAD_IMAGE = evaluator_pb2.Error(code=-3, status=400, message="bad image")
METADATA = "/ava/serving/app/metadata/app"
TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"
MIB = 1 << 20


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with running_mesh() as mesh:
        yield mesh


@pytest.fixture
async def client(mesh: Mesh) -> AsyncIterator[grpc.aio.Channel]:
    server = Server([], MAX_REQUEST_BYTES, mesh.held)
    for service in (ServingService, EdgeService):
        service(mesh.dispatcher, 10, mesh.held, Callers()).register(server)
    port = await server.start("127.0.0.1:0")
    async with channel(f"127.0.0.1:{port}") as client:
        yield client
    await server.stop(0)


async def scrape(mesh: Mesh, accept: str = "") -> Scrape:
    metrics = Metrics(mesh.shadows, mesh.dispatcher.turns, others=[RequestMetrics(mesh.dispatcher.counts, mesh.router)])
    text, content_type = await metrics.page(accept)
    return Scrape(text.decode(), content_type)


async def ask(mesh: Mesh, app: str = "app", version: str = "", *, caller: Caller | None = None) -> None:
    with suppress(ServingError):
        await mesh.dispatcher.eval(task(app, version), CallContext("r", caller or Caller(), TRACEPARENT))


def endpoints(mesh: Mesh, version: str) -> list[Any]:
    return list(mesh.router._endpoints["app", version].values())


def publish(mesh: Mesh, version: str, phase: str = "production", weight: float | None = None) -> None:
    fields = {"name": "app", "version": version, "file": "file:///x", "phase": phase, "weight": weight}
    mesh.put(release_key("app", version), validate(Release, fields))


async def test_requests_count_by_app_version_and_code(mesh: Mesh) -> None:
    evaluator = Evaluator("a")
    await mesh.add(evaluator)
    mesh.put(app_routing_key("app"), AppRouting(aliases={"best": "v1"}))
    for version in ("", "", "v1", "best"):
        await ask(mesh, version=version)
    # A code of the net's own has an HTTP status.
    evaluator.error = BAD_IMAGE
    await ask(mesh)
    await ask(mesh, version="v9")
    found = await scrape(mesh)
    assert found.by("code", "requests_total", app="app", version="v1") == {"200": 4, "400": 1}
    assert found.by("code", "requests_total", app="app", version="") == {"404": 1}
    assert found.value("attempts_total", app="app", version="v1") == 5
    assert found.value("requests_total") == 6


async def test_a_caller_who_has_left_counts_as_499(mesh: Mesh) -> None:
    evaluator = Evaluator("a", hold=asyncio.Event())
    await mesh.add(evaluator)
    asking = asyncio.create_task(ask(mesh))
    await evaluator.entered.wait()
    assert (await scrape(mesh)).value("requests_in_flight", app="app") == 1
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    found = await scrape(mesh)
    assert found.by("code", "requests_total", app="app") == {"499": 1}
    assert found.labelled("requests_in_flight", app="app")[0].value == 0


async def test_times_are_a_histogram_of_what_was_not_refused(mesh: Mesh) -> None:
    await ask(mesh)
    assert (await scrape(mesh)).value("request_seconds_count", app="app") == 0
    await mesh.add(Evaluator("a"))
    await ask(mesh)
    found = await scrape(mesh)
    assert found.value("request_seconds_count", app="app") == 1
    assert 0 < found.value("request_seconds_sum", app="app") < 60
    bounds = [sample.labels["le"] for sample in found.labelled("request_seconds_bucket", app="app")]
    assert bounds == [*map(str, SECONDS), "+Inf"]
    assert (SECONDS[0], SECONDS[-1]) == (0.001, 30)


async def test_the_slowest_request_shows_its_trace_to_openmetrics(mesh: Mesh) -> None:
    await mesh.add(Evaluator("a"))
    await ask(mesh)
    for _ in range(2):
        buckets = (await scrape(mesh, OPENMETRICS)).labelled("request_seconds_bucket", app="app")
        (exemplar,) = (sample.exemplar for sample in buckets if sample.exemplar)
        assert exemplar.labels == {"trace_id": TRACE}
        (first,) = (sample for sample in buckets if sample.exemplar)
        assert exemplar.value <= float(first.labels["le"])
        assert first.value == 1
    mesh.dispatcher.counts.of("app").times._traced_s -= 61
    buckets = (await scrape(mesh, OPENMETRICS)).labelled("request_seconds_bucket", app="app")
    assert not any(sample.exemplar for sample in buckets)


Setup = Callable[[Mesh, grpc.aio.Channel, pytest.MonkeyPatch], Coroutine[Any, Any, object]]


def body(size: int = 5) -> serving_pb2.EvalRequest:
    return serving_pb2.EvalRequest(app="app", data=[serving_pb2.Resource(body=bytes(size))])


async def call(client: grpc.aio.Channel, request: serving_pb2.EvalRequest | bytes) -> None:
    message = request if isinstance(request, bytes) else request.SerializeToString()
    with suppress(grpc.aio.AioRpcError):
        await client.unary_unary("/atserving.v1.ServingService/Eval", None, None)(message)


async def edge_call(client: grpc.aio.Channel, content_type: str, data: bytes, method: str = "Eval") -> None:
    sent = httpbody_pb2.HttpBody(content_type=content_type, data=data)
    message = edge_pb2.EdgeEvalRequest(app="app", body=sent) if method == "Eval" else sent
    with suppress(grpc.aio.AioRpcError):
        await client.unary_unary(f"/atserving.v1.EdgeService/{method}", None, None)(message.SerializeToString())


async def closed(mesh: Mesh, caller: Caller) -> None:
    mesh.put(METADATA, AppMetadata(public=False))
    await ask(mesh, caller=caller)


async def limited(mesh: Mesh) -> None:
    mesh.put(METADATA, validate(AppMetadata, {"max_requests_per_second": 0.001}))
    for _ in range(2):
        await ask(mesh)


async def full(mesh: Mesh) -> None:
    await mesh.add(Evaluator("a", FULL))
    await ask(mesh)


async def full_of_own(mesh: Mesh) -> None:
    evaluator = Evaluator("a", hold=asyncio.Event())
    await mesh.add(evaluator)
    (endpoint,) = endpoints(mesh, "v1")
    mesh.put(endpoint.instance.key, replace(endpoint.instance, capacity=1))
    first = asyncio.create_task(ask(mesh))
    await evaluator.entered.wait()
    await ask(mesh)
    assert evaluator.hold
    evaluator.hold.set()
    await first


async def no_turn(mesh: Mesh, client: grpc.aio.Channel, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(turns, "AT_ONCE", 0)
    patch.setattr(turns, "MOST_WAITING", 0)
    mesh.dispatcher.turns._waiting["app"] = deque()
    await call(client, body())
    del mesh.dispatcher.turns._waiting["app"]


async def no_memory(mesh: Mesh, client: grpc.aio.Channel) -> None:
    mesh.held.take(64 * MIB, large=False)
    await call(client, body())
    mesh.held.give(64 * MIB)


async def no_memory_for_app(mesh: Mesh, client: grpc.aio.Channel) -> None:
    share = mesh.held.share("app", 48 * MIB)
    assert share
    mesh.held.take(30 * MIB, large=True)
    await call(client, body(10 * MIB))


async def no_config(mesh: Mesh) -> None:
    mesh.synced.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gate.dispatch.MAX_SYNC_S", 0.01)
        await ask(mesh)


@pytest.mark.parametrize(
    ("reason", "app", "code", "refuse"),
    [
        ("unknown", "", "404", lambda mesh, *_: ask(mesh, "nobody")),
        ("unknown", "", "404", lambda mesh, *_: ask(mesh, "no/app\n" * 1000)),
        ("unknown", "app", "404", lambda mesh, *_: ask(mesh, version="v9")),
        ("unauthenticated", "app", "401", lambda mesh, *_: closed(mesh, Caller())),
        ("denied", "app", "403", lambda mesh, *_: closed(mesh, Caller(1, proven=True))),
        ("limit", "app", "429", lambda mesh, *_: limited(mesh)),
        ("full", "app", "429", lambda mesh, *_: full(mesh)),
        ("full", "app", "429", lambda mesh, *_: full_of_own(mesh)),
        ("unready", "app", "503", lambda mesh, *_: ask(mesh)),
        ("starting", "app", "503", lambda mesh, *_: no_config(mesh)),
        ("turns", "app", "429", no_turn),
        ("memory", "", "503", lambda mesh, client, _: no_memory(mesh, client)),
        ("memory", "app", "429", lambda mesh, client, _: no_memory_for_app(mesh, client)),
        ("malformed", "", "400", lambda _, client, __: call(client, b"\xff")),
        ("malformed", "", "400", lambda _, client, __: edge_call(client, "application/json", b"{")),
        ("malformed", "", "415", lambda _, client, __: edge_call(client, "text/plain", b"x")),
        ("malformed", "", "400", lambda _, client, __: edge_call(client, "application/json", b"[]", "Batch")),
        ("malformed", "", "400", lambda _, client, __: edge_call(client, "application/json", b"[{}]", "Batch")),
        ("malformed", "app", "400", lambda _, client, __: call(client, serving_pb2.EvalRequest(app="app"))),
    ],
)
async def test_a_refusal_counts_by_its_reason(
    mesh: Mesh,
    client: grpc.aio.Channel,
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
    app: str,
    code: str,
    refuse: Setup,
) -> None:
    if reason == "limit":
        await mesh.add(Evaluator("a"))
    await refuse(mesh, client, monkeypatch)
    found = await scrape(mesh)
    assert [
        (each.labels["app"], each.labels["reason"], each.value)
        for each in found.labelled("refusals_total")
        if each.value
    ] == [(app, reason, 1)]
    assert found.value("requests_total", app=app, code=code) == 1
    assert found.value("request_seconds_count") == found.value("requests_total") - 1


async def test_a_net_that_finds_a_request_wrong_is_no_refusal(mesh: Mesh) -> None:
    await mesh.add(Evaluator("a", evaluator_pb2.Error(code=404, status=404, message="nothing there")))
    await ask(mesh)
    found = await scrape(mesh)
    assert found.by("code", "requests_total", version="v1") == {"404": 1}
    assert not found.by("reason", "refusals_total")


async def test_the_reasons_and_causes_are_there_before_the_first(mesh: Mesh) -> None:
    found = await scrape(mesh)
    assert [each.labels["reason"] for each in found.labelled("refusals_total", app="")] == list(REFUSALS)
    assert [each.labels["cause"] for each in found.labelled("retries_total", app="")] == list(RETRIES)


async def test_the_tasks_of_a_batch_count_each(mesh: Mesh) -> None:
    await mesh.add(Evaluator("a"))
    tasks = [task(), task(), task("nobody")]
    await run_batch(mesh.dispatcher, tasks, CallContext("r", Caller()), 2, mesh.held)
    found = await scrape(mesh)
    assert found.by("code", "requests_total", app="app") == {"200": 2}
    assert found.by("code", "requests_total", app="") == {"404": 1}


async def test_a_task_that_finds_no_place_counts_once(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often its batch tries."""
    monkeypatch.setattr("gate.batch._PATIENCE_S", 0.1)
    evaluator = Evaluator("a", FULL)
    await mesh.add(evaluator)
    await run_batch(mesh.dispatcher, [task()], CallContext("r", Caller()), 1, mesh.held)
    found = await scrape(mesh)
    assert found.by("code", "requests_total", app="app") == {"429": 1}
    assert found.by("reason", "refusals_total", app="app") == {"full": 1}


async def test_a_caller_who_leaves_while_waiting_for_a_turn_counts(
    mesh: Mesh, client: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "AT_ONCE", 0)
    monkeypatch.setattr(turns, "NEXT", 0)
    leaving = asyncio.ensure_future(call(client, body()))
    await until(lambda: len(mesh.dispatcher.turns) == 1)
    leaving.cancel()
    await until(lambda: mesh.held._calls == 0)
    monkeypatch.setattr(turns, "NEXT", 1)

    async def counted() -> bool:
        return (await scrape(mesh)).by("code", "requests_total", app="app") == {"499": 1}

    await until_async(counted)


async def retries(mesh: Mesh) -> dict[str, float]:
    return (await scrape(mesh)).by("cause", "retries_total", app="app")


@pytest.mark.parametrize(("error", "cause"), [(FULL, "full"), (DRAINING, "refused"), (AWAY, "away")])
async def test_retries_count_by_what_an_instance_said(mesh: Mesh, error: evaluator_pb2.Error, cause: str) -> None:
    first = Evaluator("a", error, hold=asyncio.Event())
    await mesh.add(first)
    asking = asyncio.create_task(ask(mesh))
    await first.entered.wait()
    await mesh.add(Evaluator("b"))
    assert first.hold
    first.hold.set()
    await asking
    assert await retries(mesh) == {cause: 1}
    found = await scrape(mesh)
    assert found.value("attempts_total", app="app", version="v1") == 2
    assert found.by("code", "requests_total", app="app") == {"200": 1}


async def test_retries_count_lost_and_unreachable_instances(mesh: Mesh) -> None:
    lost = Evaluator("a", hold=asyncio.Event())
    server = await mesh.add(lost)
    asking = asyncio.create_task(ask(mesh))
    await lost.entered.wait()
    await mesh.add(Evaluator("b"))
    await server.stop()
    await asking
    assert await retries(mesh) == {"lost": 1}

    async def unreachable() -> bool:
        mesh.later_s += EJECT_S
        await ask(mesh)
        return "unreachable" in await retries(mesh)

    await until_async(unreachable)


async def test_retries_count_hedges(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "LEAST_LATE_S", 0.02)
    monkeypatch.setattr(pace, "_FACTOR", 0.0)
    monkeypatch.setattr(connection, "_LOOK_S", 0.01)
    slow = Evaluator("a", hold=asyncio.Event())
    await mesh.add(slow, built_in=True)
    asking = asyncio.create_task(ask(mesh))
    await slow.entered.wait()
    await mesh.add(Evaluator("b"), built_in=True)
    await asking
    assert await retries(mesh) == {"hedge": 1}


async def states(mesh: Mesh, version: str = "v1") -> dict[str, float]:
    return (await scrape(mesh)).by("state", "instances", app="app", version=version)


async def test_instances_count_by_state(mesh: Mesh) -> None:
    away, busy = await mesh.add(Evaluator("a")), Evaluator("b", hold=asyncio.Event())
    publish(mesh, "v2", "staging")
    await mesh.add(busy, "v2")
    await ask(mesh)
    assert await states(mesh) == {"connected": 1}
    assert await states(mesh, "v2") == {"unused": 1}
    await set_away(mesh, away, "a")
    assert await states(mesh) == {"away": 1}
    (endpoint,) = endpoints(mesh, "v2")
    mesh.put(endpoint.instance.key, replace(endpoint.instance, capacity=1))
    asking = asyncio.create_task(ask(mesh, version="v2"))
    await busy.entered.wait()
    assert await states(mesh, "v2") == {"full": 1}
    assert busy.hold
    busy.hold.set()
    await asking
    mesh.put(endpoint.instance.key, replace(endpoint.instance, digest="0" * 64))
    assert await states(mesh, "v2") == {"outdated": 1}
    await away.stop()
    await until_async(lambda: is_(mesh, {"connecting": 1}))
    for each in endpoints(mesh, "v1"):
        mesh.delete(each.instance.key)
    assert await states(mesh) == {"left": 1}


async def is_(mesh: Mesh, wanted: dict[str, float]) -> bool:
    return await states(mesh) == wanted


async def test_shares_of_a_split_are_asked_and_given(mesh: Mesh) -> None:
    for version, weight in (("v1", 3), ("v2", 1)):
        publish(mesh, version, weight=weight)
        await mesh.add(Evaluator(version), version)
    await ask(mesh, version="v2")
    assert not (await scrape(mesh)).labelled("split_share", app="app")
    for _ in range(8):
        await ask(mesh)
    found = await scrape(mesh)
    assert found.by("version", "split_share", app="app") == {"v1": 0.75, "v2": 0.25}
    assert found.by("version", "split_requests_total", app="app") == {"v1": 6, "v2": 2}


async def test_shares_without_weights_are_those_of_the_capacity(mesh: Mesh) -> None:
    publish(mesh, "v2")
    for version in ("v1", "v2"):
        await mesh.add(Evaluator(version), version)
    for endpoint in endpoints(mesh, "v1"):
        mesh.put(endpoint.instance.key, replace(endpoint.instance, capacity=24))
    await ask(mesh)
    assert (await scrape(mesh)).by("version", "split_share", app="app") == {"v1": 0.75, "v2": 0.25}


async def test_made_up_names_are_one_series(mesh: Mesh) -> None:
    await mesh.add(Evaluator("a"))
    await ask(mesh, version="made-up")
    await ask(mesh, "made-up")
    before = await scrape(mesh)
    for number in range(1000):
        await ask(mesh, version=f"made-up-{number}")
        await ask(mesh, f"made-up-{number}", "v1")
    found = await scrape(mesh)
    assert len(found.samples) == len(before.samples)
    assert found.by("code", "requests_total", app="") == {"404": 1001}
    assert found.by("code", "requests_total", app="app", version="") == {"404": 1001}


async def test_apps_and_versions_that_are_gone_drop_out_after_a_while() -> None:
    now_s, known = 0.0, {"app": {"v1", "v2"}, "other": {"v1"}}
    counts = RequestCounts(lambda app: known.get(app, ()), clock=lambda: now_s)
    for app, version in (("app", "v1"), ("app", "v2"), ("other", "v1")):
        counts.of(app).count(version, 200)
    del known["other"]
    known["app"].remove("v2")
    now_s = request_counts.GONE_S - 1
    assert [app for app, _ in counts.all()] == ["", "app", "other"]
    now_s += 1
    assert [app for app, _ in counts.all()] == ["", "app"]
    assert list(counts.of("app").versions) == ["v1"]
    # A version that comes and goes is back.
    known["app"].add("v2")
    counts.of("app").count("v2", 200)
    assert list(dict(counts.all())["app"].versions) == ["v1", "v2"]


async def test_apps_above_the_bound_count_as_one_until_others_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_counts, "MOST_APPS", 2)
    now_s, known = 0.0, {f"app{number}" for number in range(5)}
    counts = RequestCounts(lambda app: {"v1"} if app in known else (), clock=lambda: now_s)
    for number in range(5):
        counts.of(f"app{number}").count("v1", 200)
    by_app = {app: sum(each.codes.get(200, 0) for each in of.versions.values()) for app, of in counts.all()}
    assert by_app == {"": 3, "app0": 1, "app1": 1}
    known.remove("app0")
    now_s = 60.0
    counts.of("app2").count("v1", 200)
    assert [app for app, _ in counts.all()] == ["", "app1", "app2"]


async def test_the_versions_of_apps_above_the_bound_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_counts, "MOST_APPS", 0)
    counts = RequestCounts(lambda _: {"v1"}, lambda _, __: {"a"})
    for number in range(3):
        counts.of("app").count(f"v{number}", 200)
        counts.of("app").picked(f"v{number}", f"a{number}")
    ((_, unknown),) = counts.all()
    assert {name: (each.codes, each.picks) for name, each in unknown.versions.items()} == {"": ({200: 3}, {"": 3})}


async def test_attempts_count_by_instance(mesh: Mesh) -> None:
    first = Evaluator("a", FULL, hold=asyncio.Event())
    await mesh.add(first)
    asking = asyncio.create_task(ask(mesh))
    await first.entered.wait()
    await mesh.add(Evaluator("b"))
    assert first.hold
    first.hold.set()
    await asking
    assert (await scrape(mesh)).by("instance_id", "attempts_total", app="app", version="v1") == {"a": 1, "b": 1}


async def test_old_releases_without_an_instance_or_a_request_have_no_series(mesh: Mesh) -> None:
    await mesh.add(Evaluator("a"))
    await mesh.add(Evaluator("b"), "v2")
    for number in range(2, 100):
        publish(mesh, f"v{number}", "staging")
    for version in ("v1", "v3"):
        await ask(mesh, version=version)
    shown = {each.labels["version"] for each in (await scrape(mesh)).labelled("instances")}
    assert shown == {"v1", "v2", "v3"}


async def test_instances_that_are_gone_drop_out_after_a_while() -> None:
    now_s, registered = 0.0, {"a", "b"}
    counts = RequestCounts(lambda _: {"v1"}, lambda _, __: registered, clock=lambda: now_s)

    def shown() -> dict[str, int]:
        return dict(counts.all())["app"].versions["v1"].picks

    for each in ("a", "a", "b"):
        counts.of("app").picked("v1", each)
    assert shown() == {"a": 2, "b": 1}
    registered.remove("a")
    now_s = request_counts.GONE_S - 1
    assert shown() == {"a": 2, "b": 1}
    now_s += 1
    assert shown() == {"b": 1}


async def test_what_is_gone_drops_out_of_a_gate_that_nobody_scrapes(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gate.__main__._TEND_S", 0.001)
    now_s, versions = 0.0, {"v1", "v2"}
    counts = RequestCounts(lambda _: versions, clock=lambda: now_s)
    app = counts.of("app")
    for version in ("v1", "v2"):
        app.count(version, 200)
    tending = asyncio.create_task(_tend(mesh.router, counts))
    versions.remove("v2")
    now_s += request_counts.GONE_S
    await until(lambda: app.versions.keys() == {"v1"}, "the old version is forgotten")
    versions.clear()
    now_s += request_counts.GONE_S
    await until(lambda: counts.of("app") is not app, "the app is forgotten")
    tending.cancel()


async def test_instances_above_the_bound_count_as_one_of_their_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_counts, "MOST_INSTANCES", 3)
    now_s, versions, registered = 0.0, {"v1", "v2"}, {str(number) for number in range(9)}
    counts = RequestCounts(lambda app: versions if app == "app" else (), lambda _, __: registered, lambda: now_s)

    def ask_all() -> dict[str, dict[str, int]]:
        for version in ("v1", "v2"):
            for number in (1, 2):
                counts.of("app").picked(version, str(number))
        return {version: dict(each.picks) for version, each in dict(counts.all())["app"].versions.items()}

    assert ask_all() == {"v1": {"1": 1, "2": 1}, "v2": {"1": 1, "": 1}}
    # The places of instances and versions that are gone go to others.
    registered.remove("1")
    now_s += request_counts.GONE_S
    ask_all()
    registered.add("1")
    assert ask_all() == {"v1": {"2": 3, "1": 1}, "v2": {"": 3, "1": 1}}
    versions.remove("v1")
    now_s += request_counts.GONE_S
    assert ask_all() == {"v2": {"": 4, "1": 2}}
    counts.of("app").picked("v2", "2")
    assert counts.of("app").versions["v2"].picks == {"": 4, "1": 2, "2": 1}


async def test_requests_that_envoy_refuses_for_their_signature_count(mesh: Mesh, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text('{"keys": []}')
    server = Server([])
    Authorization(CallerKeys(keys), Callers(only_envoy=True), mesh.dispatcher.counts).register(server)
    port = await server.start("127.0.0.1:0")
    http = authorization_pb2.AttributeContext.HttpRequest(headers={"authorization": "Qiniu nobody:wrong"})
    attributes = authorization_pb2.AttributeContext(request=authorization_pb2.AttributeContext.Request(http=http))
    async with channel(f"127.0.0.1:{port}") as client:
        check = authorization_pb2.CheckRequest(attributes=attributes)
        await client.unary_unary(authorization.PATH, None, None)(check.SerializeToString())
    await server.stop(0)
    found = await scrape(mesh)
    assert found.by("code", "requests_total", app="") == {"401": 1}
    assert found.by("reason", "refusals_total", app="") == {"unauthenticated": 1}


async def test_a_server_counts_the_connections_that_are_too_many() -> None:
    server = Server([], held=HeldBytes(MIB), max_connections=1)
    port = await server.start("127.0.0.1:0")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await until(lambda: server.connections == 1)
    more = await asyncio.open_connection("127.0.0.1", port)
    await until(lambda: server.refused_connections == 1)
    for each in (writer, more[1]):
        each.close()
    await until(lambda: server.connections == 0)
    await server.stop(0)
    assert reader
