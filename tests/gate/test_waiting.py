"""A request for a version without an instance is refused, or waits for one, bounded in number, bytes and time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from atserving.config import (
    AppMetadata,
    Release,
    WorkerConfig,
    app_metadata_key,
    release_key,
    validate,
    worker_keys,
)
from atserving.errors import NotFound, ServingError, Unauthenticated, Unavailable
from gate import waiting
from gate.admission import Caller
from gate.batch import run_batch
from gate.dispatch import CallContext, EvalResult
from gate.waiting import MOST_OF_APP
from tests.gate.test_dispatch import DRAINING, FULL, Evaluator, Mesh, json_of, running_mesh, task
from tests.waiting import PATIENCE_S, until

ALL, APP, V1 = (worker_keys("app", "v1")[number] for number in (2, 1, 0))


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with running_mesh() as mesh:
        yield mesh


def hold(mesh: Mesh, seconds: float = 2 * PATIENCE_S, key: str = APP, timeout_s: float = 2 * PATIENCE_S) -> None:
    wait = timedelta(seconds=seconds)
    mesh.put(key, WorkerConfig(wait_for_instance=wait, timeout=timedelta(seconds=timeout_s)))


def publish(mesh: Mesh, app: str = "app", version: str = "v1", phase: Any = "production") -> None:
    mesh.put(release_key(app, version), Release(name=app, version=version, file="file:///x", phase=phase))


async def ask(mesh: Mesh, version: str = "", app: str = "app", params: str = "") -> str:
    return json_of(await mesh.dispatcher.eval(task(app, version, params=params), CallContext("r", Caller())))


def waits(mesh: Mesh, version: str = "v1") -> int:
    return mesh.dispatcher.counts.of("app").of(version).waiting


async def refused(mesh: Mesh, version: str = "") -> ServingError:
    with pytest.raises(ServingError) as caught:
        await ask(mesh, version)
    return caught.value


async def held(mesh: Mesh, count: int = 1, version: str = "", app: str = "app") -> list[asyncio.Task[str]]:
    """Send requests, and wait until they wait."""
    before = len(mesh.router.waiting)
    asking = [asyncio.create_task(ask(mesh, version, app)) for _ in range(count)]
    await until(lambda: len(mesh.router.waiting) == before + count, "the requests wait")
    return asking


async def test_without_an_instance_a_request_is_told_to_come_back(mesh: Mesh) -> None:
    error = await refused(mesh)
    assert (error.status, error.retry_after_s, error.message) == (503, 5.0, "no instance of app 'app' is ready")
    counts = mesh.dispatcher.counts.of("app")
    assert (counts.of("v1").without_instance, counts.refusals["unready"]) == (1, 1)


async def test_an_app_without_a_version_in_production_wants_none(mesh: Mesh) -> None:
    hold(mesh)
    publish(mesh, phase="staging")
    error = await refused(mesh)
    assert (error.message, error.retry_after_s) == ("app 'app' has no version in production", None)
    assert not mesh.dispatcher.counts.of("app").of("v1").without_instance


@pytest.mark.parametrize("key", [ALL, APP, V1])
@pytest.mark.parametrize("version", ["", "v1"])
async def test_a_request_waits_for_its_first_instance(mesh: Mesh, key: str, version: str) -> None:
    hold(mesh, key=key)
    (asking,) = await held(mesh, version=version)
    assert waits(mesh) == 1
    await mesh.add(Evaluator("a"))
    assert await asking == '"a:"'
    counts = mesh.dispatcher.counts.of("app").of("v1")
    assert (counts.waiting, counts.without_instance, len(mesh.router.waiting)) == (0, 1, 0)
    assert await ask(mesh) == '"a:"'
    assert counts.without_instance == 1


async def test_the_most_specific_config_decides(mesh: Mesh) -> None:
    hold(mesh, key=ALL)
    hold(mesh, 0, key=V1)
    assert (await refused(mesh, "v1")).status == 503


async def test_a_request_without_a_version_counts_for_each_that_may_serve_it(mesh: Mesh) -> None:
    publish(mesh, version="v2")
    publish(mesh, version="v3", phase="staging")
    hold(mesh)
    (asking,) = await held(mesh)
    counts = mesh.dispatcher.counts.of("app")
    assert [counts.of(each).waiting for each in ("v1", "v2", "v3")] == [1, 1, 0]
    assert [counts.of(each).without_instance for each in ("v1", "v2", "v3")] == [1, 1, 0]
    await mesh.add(Evaluator("b"), "v2")
    assert await asking == '"b:"'


async def test_the_wait_ends_with_a_503(mesh: Mesh) -> None:
    hold(mesh, 0.05)
    error = await refused(mesh)
    assert (error.status, error.retry_after_s) == (503, 5.0)
    assert error.message.startswith("no instance of app 'app' is ready; the request has waited 0.")
    assert (waits(mesh), len(mesh.router.waiting)) == (0, 0)


async def test_the_timeout_of_the_app_ends_the_wait_with_a_503_too(mesh: Mesh) -> None:
    hold(mesh, timeout_s=0.05)
    error = await refused(mesh)
    assert (error.status, error.retry_after_s) == (503, 5.0)


@pytest.mark.parametrize(("wait_s", "timeout_s"), [(0.3, 2 * PATIENCE_S), (2 * PATIENCE_S, 0.3)])
async def test_a_request_that_has_waited_and_finds_all_full_until_the_end_is_told_so(
    mesh: Mesh, wait_s: float, timeout_s: float
) -> None:
    hold(mesh, wait_s, timeout_s=timeout_s)
    (asking,) = await held(mesh)
    await mesh.add(Evaluator("a", FULL))
    with pytest.raises(ServingError) as caught:
        await asking
    assert caught.value.status == 429
    assert caught.value.retry_after_s


async def test_a_shorter_wait_counts_for_those_that_wait(mesh: Mesh) -> None:
    hold(mesh)
    (asking,) = await held(mesh)
    hold(mesh, 0.01)
    with pytest.raises(Unavailable, match="the request has waited"):
        await asking


async def test_who_may_no_longer_call_the_app_waits_no_more(mesh: Mesh) -> None:
    hold(mesh)
    (asking,) = await held(mesh)
    mesh.put(app_metadata_key("app"), validate(AppMetadata, {"public": False, "owner": {"uid": 7}}))
    with pytest.raises(Unauthenticated):
        await asking
    assert len(mesh.router.waiting) == 0


async def test_who_leaves_waits_no_more(mesh: Mesh) -> None:
    hold(mesh)
    (asking,) = await held(mesh)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert (waits(mesh), len(mesh.router.waiting)) == (0, 0)
    evaluator = Evaluator("a")
    await mesh.add(evaluator)
    assert await ask(mesh) == '"a:"'
    assert len(evaluator.received) == 1


async def test_only_so_many_requests_of_an_app_wait_and_the_others_are_refused_at_once(mesh: Mesh) -> None:
    hold(mesh, key=ALL)
    asking = await held(mesh, MOST_OF_APP)
    refusals = await asyncio.gather(*(refused(mesh) for _ in range(1000 - MOST_OF_APP)))
    assert {(each.status, each.retry_after_s) for each in refusals} == {(503, 5.0)}
    assert {each.message for each in refusals} == {"no instance of app 'app' is ready; too many requests wait for one"}
    publish(mesh, "other")
    (other,) = await held(mesh, app="other")
    assert mesh.dispatcher.counts.of("app").of("v1").without_instance == 1000
    await mesh.add(Evaluator("b"), app="other")
    assert await other == '"b:"'
    # An instance takes a few at once, and all get their answer.
    await mesh.add(Evaluator("a"))
    assert set(await asyncio.gather(*asking)) == {'"a:"'}


async def test_only_so_many_requests_and_bytes_wait_in_all(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(mesh, key=ALL)
    publish(mesh, "other")
    monkeypatch.setattr(waiting, "MOST_WAITING", 1)
    (first,) = await held(mesh)
    with pytest.raises(Unavailable, match="too many requests wait"):
        await ask(mesh, app="other")
    monkeypatch.setattr(waiting, "MOST_WAITING", 9)
    size = task().size()
    monkeypatch.setattr(waiting, "MOST_BYTES_OF_APP", size * 3 // 2)
    monkeypatch.setattr(waiting, "MOST_BYTES", size * 5 // 2)
    with pytest.raises(Unavailable, match="too many requests wait"):
        await ask(mesh)
    (second,) = await held(mesh, app="other")
    publish(mesh, "third")
    with pytest.raises(Unavailable, match="too many requests wait"):
        await ask(mesh, app="third")
    for asking in (first, second):
        asking.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    (third,) = await held(mesh, app="third")
    third.cancel()


async def test_what_is_full_when_those_that_waited_come_is_no_reason_to_refuse_them(mesh: Mesh) -> None:
    hold(mesh)
    asking = await held(mesh, 3)
    evaluator = Evaluator("a", FULL)
    await mesh.add(evaluator)
    await evaluator.entered.wait()
    evaluator.error = None
    assert await asyncio.gather(*asking) == ['"a:"'] * 3
    # One that did not wait is refused as ever.
    evaluator.error = FULL
    assert (await refused(mesh)).status == 429


async def test_a_request_of_an_instance_that_leaves_waits_for_the_next(mesh: Mesh) -> None:
    hold(mesh)
    await mesh.add(Evaluator("a", DRAINING))
    asking = asyncio.create_task(ask(mesh))
    await until(lambda: waits(mesh), "the request waits")
    await mesh.add(Evaluator("b"))
    assert await asking == '"b:"'


async def test_an_instance_that_comes_and_goes_leaves_the_request_waiting(mesh: Mesh) -> None:
    hold(mesh)
    (asking,) = await held(mesh)
    server = await mesh.add(Evaluator("a", DRAINING))
    for key in list(mesh.instance_keys):
        mesh.delete(key)
    await server.stop()
    await until(lambda: waits(mesh), "the request waits again")
    await mesh.add(Evaluator("b"))
    assert await asking == '"b:"'


async def test_changes_of_other_apps_wake_nobody(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(mesh)
    (asking,) = await held(mesh)
    woken: list[object] = []
    monkeypatch.setattr(waiting, "_wake", woken.append)
    publish(mesh, "other")
    await mesh.add(Evaluator("b"), app="other")
    assert not woken
    hold(mesh, key=ALL)
    assert len(woken) == 1
    asking.cancel()


async def test_a_request_for_a_version_that_is_deleted_ends_with_a_404(mesh: Mesh) -> None:
    hold(mesh)
    publish(mesh, version="v2", phase="staging")
    (asking,) = await held(mesh, version="v2")
    mesh.delete(release_key("app", "v2"))
    with pytest.raises(NotFound):
        await asking
    assert len(mesh.router.waiting) == 0


async def test_a_request_goes_to_a_version_that_is_promoted_meanwhile(mesh: Mesh) -> None:
    hold(mesh)
    publish(mesh, version="v2", phase="staging")
    await mesh.add(Evaluator("b"), "v2")
    (asking,) = await held(mesh)
    publish(mesh, version="v2")
    assert await asking == '"b:"'
    assert (waits(mesh), waits(mesh, "v2")) == (0, 0)


async def test_the_tasks_of_a_batch_wait_too(mesh: Mesh) -> None:
    hold(mesh)
    tasks = [task() for _ in range(5)]
    batch = asyncio.create_task(run_batch(mesh.dispatcher, tasks, CallContext("r", Caller()), 2, mesh.held))
    await until(lambda: waits(mesh) == 1, "one of them waits, and the others behind it")
    await mesh.add(Evaluator("a"))
    assert [json_of(each) for each in await batch if isinstance(each, EvalResult)] == ['"a:"'] * 5


async def test_the_tasks_of_a_batch_that_wait_hold_up_no_others(mesh: Mesh) -> None:
    hold(mesh, key=ALL)
    publish(mesh, version="v2", phase="staging")
    publish(mesh, "other")
    ready = [Evaluator("b"), Evaluator("c")]
    await mesh.add(ready[0], "v2")
    await mesh.add(ready[1], app="other")
    tasks = [task() for _ in range(40)]
    tasks += [each for _ in range(10) for each in (task(version="v2"), task("other"))]
    batch = asyncio.create_task(run_batch(mesh.dispatcher, tasks, CallContext("r", Caller()), 2, mesh.held))
    await until(lambda: all(len(each.received) == 10 for each in ready), "all others are done")
    assert waits(mesh) == 1
    await mesh.add(Evaluator("a"))
    outcomes = [json_of(each) for each in await batch if isinstance(each, EvalResult)]
    assert outcomes == ['"a:"'] * 40 + ['"b:"', '"c:"'] * 10


async def test_the_tasks_of_a_batch_that_come_to_a_full_instance_hold_up_no_others(mesh: Mesh) -> None:
    hold(mesh, key=ALL)
    publish(mesh, "other")
    tasks = [*[task() for _ in range(5)], *[task("other") for _ in range(5)]]
    batch = asyncio.create_task(run_batch(mesh.dispatcher, tasks, CallContext("r", Caller()), 2, mesh.held))
    await until(lambda: len(mesh.router.waiting) == 2, "one task of each app waits")
    full = Evaluator("a", FULL)
    await mesh.add(full)
    await full.entered.wait()
    other = Evaluator("b")
    await mesh.add(other, app="other")
    await until(lambda: len(other.received) == 5, "all others are done")
    full.error = None
    assert len([each for each in await batch if isinstance(each, EvalResult)]) == 10


async def test_a_batch_ends_soon_after_the_wait(mesh: Mesh) -> None:
    hold(mesh, 0.05)
    outcomes = await run_batch(mesh.dispatcher, [task() for _ in range(100)], CallContext("r", Caller()), 2, mesh.held)
    assert {each.status for each in outcomes if isinstance(each, ServingError)} == {503}
    assert len(outcomes) == 100


async def test_an_unreached_instance_is_asked_again_without_a_change_of_the_config(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gate.attempts._UNREACHED_STEP_S", 0.02)
    monkeypatch.setattr("gate.attempts._RECONNECT_S", 0.0)
    hold(mesh)
    server = await mesh.add(Evaluator("a"))
    await server.stop()
    asking = asyncio.create_task(ask(mesh))
    await until(lambda: waits(mesh), "the request waits")
    (endpoint,) = mesh.router._endpoints["app", "v1"].values()
    await server.start(int(endpoint.instance.address.rpartition(":")[2]))
    assert await asking == '"a:"'
