"""A version in staging gets copies of requests. Callers notice nothing, and the answers are compared."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import msgspec
import pytest

from atserving.config import DEFAULT_WORKER_KEY, AppRouting, Release, Shadow, app_routing_key, parse
from atserving.v1 import evaluator_pb2
from gate import compare, shadow
from gate.admission import Caller
from gate.batch import run_batch
from gate.bodies import Body
from gate.dispatch import CallContext, Task
from gate.shadow import Comparison
from tests.gate.test_dispatch import Evaluator, Mesh, json_of, running_mesh, task
from tests.waiting import until

STAGED = Release(name="app", version="v2", file="file:///y", phase="staging")
REFUSAL = evaluator_pb2.Error(code=429, status=429, message="full", refused=True)


def cast(mesh: Mesh, percent: float = 100, **tolerances: float) -> None:
    """Let v2 get copies."""
    mesh.put(STAGED.key, STAGED)
    mesh.put(app_routing_key("app"), AppRouting(shadow=Shadow(version="v2", percent=percent, **tolerances)))


def found(mesh: Mesh) -> Comparison:
    (one,) = mesh.shadows.found()
    return one


def counts(mesh: Mesh) -> tuple[int, int, int, int]:
    if not mesh.shadows.found():
        return 0, 0, 0, 0
    one = found(mesh)
    return one.equal, one.different, one.failed, one.dropped


async def ask(mesh: Mesh, reqid: str = "reqid", **fields: str) -> str:
    return json_of(await mesh.dispatcher.eval(task(**fields), CallContext(reqid, Caller())))


@pytest.fixture
async def asked() -> AsyncIterator[Mesh]:
    """A mesh whose v1 answers."""
    async with running_mesh() as mesh:
        await mesh.add(Evaluator("a"))
        yield mesh


@pytest.mark.parametrize(
    ("percent", "of_a_hundred"), [(0.0, 0), (0.5, 0), (1.0, 1), (33.3, 33), (50.0, 50), (100.0, 100)]
)
async def test_the_share_is_exact(asked: Mesh, percent: float, of_a_hundred: int) -> None:
    copies = Evaluator("a")
    await asked.add(copies, "v2")
    cast(asked, percent)
    due: list[int] = []
    for number in range(1, 101):
        assert await ask(asked) == '"a:"'
        due.append(int(number * percent / 100 + 1e-9))
        await until(lambda: len(copies.received) >= due[-1])
        assert len(copies.received) == due[-1]
    assert len(copies.received) == of_a_hundred


async def test_answers_are_compared(asked: Mesh) -> None:
    await asked.add(Evaluator("a"), "v2")
    cast(asked)
    await ask(asked, "one")
    await until(lambda: counts(asked) == (1, 0, 0, 0))
    one = found(asked)
    assert (one.version, one.baseline, one.digest, one.times.total()) == ("v2", "v1", STAGED.digest, 1)
    asked.delete("/ava/serving/instance/app/v2/a")
    other = Evaluator("b")
    await asked.add(other, "v2")
    assert await ask(asked, "two") == '"a:"'
    await until(lambda: counts(asked) == (1, 1, 0, 0))
    (sample,) = one.samples
    assert (sample.reqid, sample.reason, sample.failed) == ("two", ': "a:" and "b:"', False)
    assert asked.shadows.changed.is_set()


async def test_requests_for_a_version_are_not_copied_and_tasks_of_a_batch_are(asked: Mesh) -> None:
    copies = Evaluator("a")
    await asked.add(copies, "v2")
    cast(asked)
    await ask(asked, version="v1")
    await ask(asked, version="v2")
    assert len(copies.received) == 1
    await run_batch(asked.dispatcher, [task(), task()], CallContext("reqid", Caller()), 2, asked.held)
    await until(lambda: counts(asked) == (2, 0, 0, 0))


async def test_a_hanging_version_costs_callers_nothing(asked: Mesh) -> None:
    copies = Evaluator("a", hold=asyncio.Event())
    await asked.add(copies, "v2")
    cast(asked)
    for _ in range(20):
        began_s = time.monotonic()
        assert await ask(asked) == '"a:"'
        assert time.monotonic() - began_s < 5
    # It may be half full.
    await until(lambda: (len(copies.received), counts(asked)) == (4, (0, 0, 0, 16)))
    assert copies.hold
    copies.hold.set()
    await until(lambda: counts(asked) == (4, 0, 0, 16))
    assert found(asked).slower == 4
    assert asked.held.held == 0


async def test_a_copy_has_a_deadline(asked: Mesh) -> None:
    await asked.add(Evaluator("a", hold=asyncio.Event()), "v2")
    cast(asked)
    asked.put(DEFAULT_WORKER_KEY, parse(DEFAULT_WORKER_KEY, '{"timeout": "200ms"}'))
    await ask(asked)
    await until(lambda: counts(asked) == (0, 0, 1, 0))
    assert found(asked).samples[0].reason == "no answer in time"
    assert asked.held.held == 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (evaluator_pb2.Error(code=500, status=500, message="no memory"), (0, 0, 1, 0)),
        (REFUSAL, (0, 0, 0, 1)),
        (evaluator_pb2.Error(code=503, status=503, message="away", refused=True, retry_after_ms=9), (0, 0, 0, 1)),
    ],
)
async def test_a_copy_is_asked_once(
    asked: Mesh, error: evaluator_pb2.Error, expected: tuple[int, int, int, int]
) -> None:
    both = [Evaluator(name, error=error) for name in ("x", "y")]
    for each in both:
        await asked.add(each, "v2")
    cast(asked)
    assert await ask(asked) == '"a:"'
    await until(lambda: counts(asked) == expected)
    assert sum(len(each.received) for each in both) == 1


async def test_a_version_without_an_instance_drops_copies(asked: Mesh) -> None:
    cast(asked)
    assert await ask(asked) == '"a:"'
    await until(lambda: counts(asked) == (0, 0, 0, 1))


async def test_an_instance_that_dies_under_a_copy_costs_callers_nothing(asked: Mesh) -> None:
    copies = Evaluator("a", hold=asyncio.Event())
    server = await asked.add(copies, "v2")
    cast(asked)
    await ask(asked)
    await copies.entered.wait()
    await server.stop()
    await until(lambda: counts(asked) == (0, 0, 1, 0))
    assert await ask(asked) == '"a:"'
    assert asked.held.held == 0


@pytest.mark.parametrize("bound", ["MOST_BYTES", "MOST_COPIES", "held"])
async def test_copies_are_bounded(asked: Mesh, bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = Evaluator("a", hold=asyncio.Event())
    await asked.add(copies, "v2")
    cast(asked)
    length = 1 << 20
    body = Body([b"x" * length])
    if bound == "held":
        asked.held.take((48 << 20) - length * 3 // 2, large=True)
    else:
        monkeypatch.setattr(shadow, bound, length * 3 // 2 if bound == "MOST_BYTES" else 1)
    before = asked.held.held
    for _ in range(3):
        large = Task("app", "", evaluator_pb2.InferRequest(), body)
        await asked.dispatcher.eval(large, CallContext("reqid", Caller()))
    await until(lambda: counts(asked)[3] == 2)
    assert asked.held.held - before > length
    assert copies.hold
    copies.hold.set()
    await until(lambda: counts(asked) == (1, 0, 0, 2))
    assert asked.held.held == before


async def test_answers_that_wait_to_be_compared_are_bounded(asked: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    long = Evaluator("a", stream=b"x" * (1 << 20))
    asked.delete("/ava/serving/instance/app/v1/a")
    await asked.add(long)
    await asked.add(long, "v2")
    cast(asked)
    free = threading.Event()
    compared = compare.difference
    monkeypatch.setattr(compare, "difference", lambda *each: free.wait(60) and compared(*each))
    monkeypatch.setattr(shadow, "MOST_COPIES", 3)
    for _ in range(6):
        await asked.dispatcher.eval(task(), CallContext("reqid", Caller()))
    await until(lambda: counts(asked)[3] == 3)
    assert asked.held.held > 3 << 20
    free.set()
    await until(lambda: counts(asked) == (3, 0, 0, 3))
    assert asked.held.held == 0


async def test_a_task_of_a_batch_is_timed_by_itself(asked: Mesh) -> None:
    await asked.add(Evaluator("a"), "v2")
    cast(asked)
    waited = CallContext("reqid", Caller(), started=time.monotonic() - 20, batched=True)
    await asked.dispatcher.eval(task(), waited)
    await until(lambda: counts(asked)[0] == 1)
    assert max(found(asked).baseline_times) < shadow.bucket(10)


@pytest.mark.parametrize("change", ["content", "tolerance", "baseline"])
async def test_counts_begin_anew_when_what_is_compared_changes(asked: Mesh, change: str) -> None:
    await asked.add(Evaluator("a"), "v2")
    cast(asked)
    await ask(asked)
    await until(lambda: counts(asked) == (1, 0, 0, 0))
    first = found(asked)
    if change == "content":
        asked.put(STAGED.key, msgspec.structs.replace(STAGED, file="file:///z"))
    elif change == "tolerance":
        cast(asked, score_tolerance=0.5)
    else:
        changed = Release(name="app", version="v1", file="file:///z", phase="production")
        asked.put(changed.key, changed)
    await ask(asked)
    await until(lambda: found(asked) is not first and counts(asked) == (1, 0, 0, 0))


@pytest.mark.parametrize("ends", [AppRouting(), AppRouting(shadow=Shadow(version="v3", percent=100))])
async def test_nothing_is_copied_without_a_version_in_staging(asked: Mesh, ends: AppRouting) -> None:
    copies = Evaluator("a")
    await asked.add(copies, "v2")
    cast(asked)
    asked.put(app_routing_key("app"), ends)
    await ask(asked)
    cast(asked)
    promoted = msgspec.structs.replace(STAGED, phase="production", weight=0.0)
    asked.put(promoted.key, promoted)
    await ask(asked)
    assert asked.shadows.found() == []
    # A copy that comes later is the first one.
    cast(asked)
    await ask(asked)
    await until(lambda: counts(asked)[0] > 0)
    assert len(copies.received) == 1
