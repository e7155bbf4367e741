"""A call that has ended keeps no body in memory, however it ended and whoever still knows of it."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from atserving import link
from atserving.errors import InvalidArgument, ServingError
from atserving.held import HeldBytes
from atserving.v1.evaluator_pb2 import InferRequest
from atserving.v1.serving_pb2 import Resource
from evaluator.fetching.addresses import AddressPolicy
from evaluator.fetching.fetch_times import Fetch
from evaluator.fetching.resources import ResourceFetcher
from evaluator.limits import Budget
from evaluator.net_config import NetConfig
from evaluator.serving.pipeline import Pipeline, Request
from evaluator.serving.supervisor import WorkerSupervisor
from tests.evaluator.calling import DIGIT, ask, connected
from tests.evaluator.serving.fronts import pipeline
from tests.evaluator.serving.test_ops_http import samples, worker_pid
from tests.pod_memory import forget_most, most_mib
from tests.processes import Process, Registry, evaluator
from tests.waiting import until, until_async

BODY_BYTES = 1 << 20


class Body(bytearray):
    """A request's body, whose end can be seen."""


class Replier:
    """Takes replies."""

    def __init__(self) -> None:
        self.replies: list[link.Reply] = []

    def hold(self, count: int) -> bool:
        return True

    def reply(self, reply: link.Reply, held: int = 0) -> None:
        self.replies.append(reply)


@contextmanager
def without_collector() -> Iterator[None]:
    """Leave memory to the counting of references: large bodies make few objects, so the collector rarely runs."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def begin(served: Pipeline, number: int, replier: Replier) -> tuple[Request, weakref.ref[Body]]:
    body = Body(BODY_BYTES)
    call = link.Call(number, 0, 0, b"r", b"", cast(link.Buffer, body))
    return served.begin(call, replier), weakref.ref(body)


async def test_an_ended_request_lets_go_of_its_body(tmp_path: Path) -> None:
    served, replier = pipeline(tmp_path, HeldBytes(1 << 30)), Replier()
    worker = served.worker
    with without_collector():
        answered, first = begin(served, 1, replier)
        abandoned, second = begin(served, 2, replier)
        expired, third = begin(served, 3, replier)
        assert all(body() is not None for body in (first, second, third))
        (id_, *_) = worker._calls
        worker._take_reply(link.Reply(id_, link.RESULT, 0, 0, 0, 0, 1, 1, b""))
        abandoned.abandon()
        expired.expire()
        assert answered.ended
        assert [reply.id for reply in replier.replies] == [1, 3]
        assert [body() for body in (first, second, third)] == [None, None, None]


class Fetcher(ResourceFetcher):
    """Fetches all URIs but one, which fails afterwards."""

    def __init__(self) -> None:
        super().__init__(BODY_BYTES, AddressPolicy())
        self.budgets: list[weakref.ref[Budget]] = []

    async def fetch(self, uri: str, budget: Budget | None = None, one: Fetch | None = None) -> bytes:
        if uri.endswith("/missing"):
            await asyncio.sleep(0)
            raise InvalidArgument("its host answered 404")
        assert budget
        self.budgets.append(weakref.ref(budget))
        return bytes(BODY_BYTES)


async def test_a_failed_fetch_keeps_no_other_resource_of_its_request(tmp_path: Path) -> None:
    fetcher, replier = Fetcher(), Replier()
    served = pipeline(tmp_path, HeldBytes(1 << 30), fetcher=fetcher, net="")
    data = [Resource(uri=f"http://host/{name}") for name in ("1", "2", "missing")]
    request = InferRequest(data=data, group=True).SerializeToString()
    with without_collector():
        served.begin(link.Call(1, 0, link.FETCH, b"r", b"", request), replier)
        await until(lambda: replier.replies)
        # Whoever has the budget has the resources, too.
        assert [budget() for budget in fetcher.budgets] == [None, None]


async def test_cancelled_calls_leave_the_queue_of_a_busy_worker(tmp_path: Path) -> None:
    config = NetConfig({}, workspace=tmp_path)
    worker = WorkerSupervisor(config)
    kept = worker.submit(b"kept", b"x", time.monotonic() + 60, Taker(), stays=True)
    for _ in range(1000):
        worker.cancel(worker.submit(b"r", bytes(1000), time.monotonic() + 60, Taker(), stays=True))
    assert list(worker._calls) == [kept.id]
    assert len(worker._window.waiting) < 100
    assert sum(len(each.request) for each in worker._window.waiting) == 1
    await asyncio.sleep(0)


async def test_cancelled_calls_keep_no_bodies_while_the_worker_reads_nothing(registry: Registry) -> None:
    registry.publish("standing", custom_values={"net": "classify"}, batch_size=16)
    max_held = 64
    with evaluator(registry, "standing", "v1", "--max-held", str(max_held)) as process:
        async with connected(process) as instance:
            assert (await ask(instance, InferRequest(data=[DIGIT]))).result_json
            os.kill(worker_pid(process), signal.SIGSTOP)
            forget_most(process)
            before_mib = most_mib(process)
            large = InferRequest(data=[Resource(body=bytes(10 << 20))])
            for _ in range(6):
                answers = [ask(instance, large) for _ in range(4)]
                await until_async(lambda: has_in_flight(process, 4), what="the calls have arrived")
                for answer in answers:
                    answer.cancel()
                await until_async(lambda: has_in_flight(process, 0), what="the calls are cancelled")
            assert most_mib(process) < before_mib + max_held + 32


async def has_in_flight(process: Process, count: int) -> bool:
    return (await samples(process))["requests_in_flight",] == count


class Taker:
    """Takes no outcome: the calls here get none."""

    def answered(self, reply: link.Reply) -> None:
        raise AssertionError

    def failed(self, error: ServingError) -> None:
        raise AssertionError
