"""The metrics of an instance tell why it refuses requests, how full it is, and which trace its slowest request has."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.samples import Sample

from atserving import link
from atserving.held import HeldBytes
from atserving.v1.evaluator_pb2 import InferRequest
from atserving.v1.serving_pb2 import Resource
from evaluator.serving.capacity import REFUSALS
from evaluator.serving.pipeline import Pipeline
from tests.evaluator.calling import DIGIT, ask, connected
from tests.evaluator.serving.fronts import pipeline
from tests.evaluator.serving.test_held import MIB, Replier
from tests.evaluator.serving.test_ops_http import samples, worker_pid
from tests.metric_text import OPENMETRICS, families
from tests.processes import Registry, evaluator
from tests.waiting import until_async

PLAIN = InferRequest(data=[Resource(body=b"x")]).SerializeToString()
REMOTE = InferRequest(data=[Resource(uri="http://images.test/7.png")]).SerializeToString()
TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01".encode()


async def scraped(served: Pipeline) -> list[Sample]:
    text, content_type = await served.metrics.page(OPENMETRICS)
    return [sample for family in families(text.decode(), content_type) for sample in family.samples]


async def refusals(served: Pipeline) -> dict[str, float]:
    """Return the refusals by their reason, without zeros."""
    found = {
        each.labels["reason"]: each.value
        for each in await scraped(served)
        if each.name == "atserving_evaluator_refusals_total"
    }
    assert list(found) == list(REFUSALS)
    return {reason: count for reason, count in found.items() if count}


def begin(served: Pipeline, flags: int = 0, request: bytes = PLAIN, traceparent: bytes = b"") -> Replier:
    replier = Replier()
    served.begin(link.Call(1, 0, flags, b"r", traceparent, request), replier)
    return replier


def fill(served: Pipeline) -> None:
    served.capacity.limit = 1
    served.capacity.enter()


def fill_for_batches(served: Pipeline) -> None:
    served.capacity.limit = 4
    for _ in range(3):
        served.capacity.enter()


def drain(served: Pipeline) -> None:
    served.capacity.drain()


def go_away(served: Pipeline) -> None:
    served.worker._go_away("it died", keep=())


def fill_memory(served: Pipeline) -> None:
    assert served.held.take(MIB, large=False)


@pytest.mark.parametrize(
    ("reason", "flags", "prepare"),
    [
        ("full", 0, fill),
        ("full", link.BATCHED, fill),
        ("batches", link.BATCHED, fill_for_batches),
        ("memory", 0, fill_memory),
        ("away", 0, go_away),
        ("leaving", 0, drain),
        ("leaving", link.FETCH, drain),
    ],
)
async def test_a_refusal_counts_by_its_reason(
    reason: str, flags: int, prepare: Callable[[Pipeline], None], tmp_path: Path
) -> None:
    served = pipeline(tmp_path, HeldBytes(MIB))
    assert not await refusals(served)
    prepare(served)
    replier = begin(served, flags, REMOTE if flags & link.FETCH else PLAIN)
    for _ in range(3):
        await asyncio.sleep(0)
    assert [error.refused for error in replier.errors] == [True]
    assert await refusals(served) == {reason: 1}


async def test_a_long_call_that_is_not_admitted_counts(tmp_path: Path) -> None:
    served = pipeline(tmp_path, HeldBytes(MIB))
    assert not served.admit(1, 2 * MIB, Replier())
    assert await refusals(served) == {"memory": 1}


@pytest.mark.parametrize(("reason", "hosts"), [("fetching", ["a.test", "b.test"]), ("host", ["images.test"])])
async def test_a_request_without_a_place_to_fetch_counts(reason: str, hosts: list[str], tmp_path: Path) -> None:
    served = pipeline(tmp_path, HeldBytes(MIB), capacity=2)
    fetching = [served.capacity.fetch([host]) for host in hosts]
    for each in fetching:
        await each.__aenter__()
    replier = begin(served, link.FETCH, REMOTE)
    await asyncio.sleep(0)
    assert [error.refused for error in replier.errors] == [True]
    assert await refusals(served) == {reason: 1}
    for each in fetching:
        await each.__aexit__(None, None, None)


async def test_calls_that_are_handed_back_count_as_away(tmp_path: Path) -> None:
    served = pipeline(tmp_path, HeldBytes(MIB))
    begin(served)
    go_away(served)
    assert await refusals(served) == {"away": 1}


async def test_a_request_that_fails_is_no_refusal(tmp_path: Path) -> None:
    served = pipeline(tmp_path, HeldBytes(MIB))
    replier = begin(served, link.FETCH, InferRequest().SerializeToString())
    assert [error.status for error in replier.errors] == [400]
    served.begin(link.Call(1, 0, 0, b"r", b"", PLAIN), replier).expire()
    assert [error.status for error in replier.errors] == [400, 504]
    assert not await refusals(served)


async def test_gauges_tell_how_full_the_instance_is(tmp_path: Path) -> None:
    served = pipeline(tmp_path, HeldBytes(MIB), capacity=5)
    served.metrics.of_capacity(served.capacity, served.held, lambda: 2)
    begin(served)
    async with served.capacity.fetch(["a.test"]):
        found = {each.name.removeprefix("atserving_evaluator_"): each.value for each in await scraped(served)}
    assert found["requests_in_flight"] == found["requests_fetching"] == 1
    assert (found["held_bytes"], found["max_held_bytes"]) == (len(PLAIN), MIB)
    assert (found["max_concurrent"], found["connections"]) == (5, 2)


@pytest.mark.parametrize("wrong", [b"", b"\xff\n", TRACEPARENT.upper(), b'00-"} 1\n-b7ad6b7169203331-01', b"x" * 9999])
async def test_the_slowest_request_shows_its_trace(wrong: bytes, tmp_path: Path) -> None:
    served = pipeline(tmp_path, HeldBytes(MIB))

    async def exemplars() -> list[dict[str, str]]:
        return [each.exemplar.labels for each in await scraped(served) if each.exemplar]

    for traceparent, shown in ((wrong, []), (TRACEPARENT, [{"trace_id": TRACE}]), (wrong, [{"trace_id": TRACE}])):
        begin(served, traceparent=traceparent)
        (call,) = served.worker._calls.values()
        assert call.taker
        served.worker._take_reply(link.Reply(call.id, link.RESULT, 0, 0, 0, 0, 1, 1, b""))
        assert await exemplars() == shown
    (bucket,) = (each for each in await scraped(served) if each.exemplar)
    assert bucket.exemplar
    assert (bucket.labels["stage"], bucket.exemplar.value <= float(bucket.labels["le"])) == ("total", True)


@pytest.mark.slow
async def test_the_limit_follows_the_settings_and_a_worker_that_stands_still_is_away(registry: Registry) -> None:
    registry.publish("admitting", custom_values={"net": "classify"})
    with evaluator(registry, "admitting") as process:

        async def shows(name: str, value: float) -> bool:
            return (await samples(process))[name,] == value

        registry.put("worker/app/admitting/default", {"max_concurrent": 7})
        await until_async(lambda: shows("max_concurrent", 7))
        async with connected(process) as gate:
            assert (await ask(gate, InferRequest(data=[DIGIT]))).result_json
            await until_async(lambda: shows("connections", 1))
            assert await shows("worker_away", 0)
            worker = worker_pid(process)
            os.kill(worker, signal.SIGSTOP)
            answer = await ask(gate, InferRequest(data=[DIGIT]), stays=False)
            assert answer.error.refused
            assert await shows("worker_away", 1)
            assert (await samples(process))["refusals_total", "away"] == 1
            os.kill(worker, signal.SIGCONT)
            await until_async(lambda: shows("worker_away", 0))
        await until_async(lambda: shows("connections", 0))
