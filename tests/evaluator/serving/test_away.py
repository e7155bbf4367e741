"""An instance whose worker is dead, loads again or stands still keeps no request that another one could answer.

Real evaluators, workers and gates; the files of a folder hold the script up, so that no test depends on time.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import orjson
import pytest

from atserving import transport
from atserving.v1 import serving_pb2, serving_pb2_grpc
from atserving.v1.evaluator_pb2 import InferRequest, InferResponse
from gate.connection import EvaluatorConnection
from tests.evaluator.calling import DIGIT, ask, connected
from tests.evaluator.digits import digits_tar
from tests.processes import Evaluator, Gate, Registry, evaluator
from tests.waiting import until, until_async

SCRIPT = """
import os, time
from pathlib import Path

def wait_while(name):
    while (Path(FOLDER) / name).exists():
        time.sleep(0.01)

def net_init(cfg):
    wait_while("load")
    return {"batch_size": 1}

def net_inference(model, args):
    params = args["reqs"][0].get("params") or {}
    if params.get("wait"):
        (Path(FOLDER) / "entered").touch()
        wait_while(params["wait"])
    return [{"code": 0, "result": os.getppid()}]
"""


class Hold:
    """A file that holds the script up while it exists."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file = folder / name

    def __enter__(self) -> Hold:
        self._file.touch()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.unlink(missing_ok=True)


class Instances:
    """Two instances of a script, ``a`` and ``b``, and a gate."""

    def __init__(self, folder: Path, a: Evaluator, b: Evaluator, gate: Gate) -> None:
        self.folder = folder
        self.a, self.b = a, b
        self.gate = gate

    async def eval(self) -> int:
        """Return the id of the evaluator that answered through the gate."""
        return int((await self.gate.eval("app")).result_json)

    async def evals(self, count: int = 30) -> set[int]:
        """Return who answered requests through the gate."""
        return {int(each.result_json) for each in await evals(self.gate, "app", count)}

    async def logged(self, event: str) -> None:
        """Wait until ``a`` has logged an event."""
        await asyncio.to_thread(self.a.logged, event=event)

    async def seen_away(self) -> None:
        """Wait until the gate knows that ``a`` is away: its requests go to ``b``."""

        async def seen() -> bool:
            return await self.evals(10) == {self.b.pid}

        await until_async(seen, what="the gate asks b alone")

    async def seen_back(self) -> None:
        """Wait until the gate asks both."""

        async def seen() -> bool:
            return await self.evals(20) == {self.a.pid, self.b.pid}

        await until_async(seen, what="the gate asks both")


async def evals(gate: Gate, app: str, count: int) -> list[serving_pb2.EvalResponse]:
    """Ask one request after the other over one connection, and return the answers."""
    async with transport.channel(gate.address) as channel:
        stub = serving_pb2_grpc.ServingServiceStub(channel)
        request = serving_pb2.EvalRequest(app=app, data=[serving_pb2.Resource(body=DIGIT.body)])
        return [await stub.Eval(request, wait_for_ready=True, timeout=60) for _ in range(count)]


@pytest.fixture
def instances(registry: Registry, tmp_path: Path) -> Iterator[Instances]:
    script = f"FOLDER = {str(tmp_path)!r}\n{SCRIPT}".encode()
    registry.publish("app", file=digits_tar(tmp_path / "release.tar", **{"net.py": script}), phase="production")
    gate = Gate([registry.address])
    with ExitStack() as stack:
        a, b = (stack.enter_context(evaluator(registry, "app", "v1", "--sandbox=off")) for _ in range(2))
        gate.start()
        stack.callback(gate.kill)
        yield Instances(tmp_path, a, b, gate)
        registry.delete("eval/app/v1")


@asynccontextmanager
async def link_to(process: Evaluator) -> AsyncIterator[EvaluatorConnection]:
    """Connect as a gate that has others to ask."""
    async with connected(process) as connection:
        yield connection


def hand_over(connection: EvaluatorConnection, count: int = 1, wait: str = "") -> list[asyncio.Future[InferResponse]]:
    """Send requests that may be handed back."""
    request = InferRequest(data=[DIGIT], params_json=orjson.dumps({"wait": wait}).decode())
    return [ask(connection, request, stays=False) for _ in range(count)]


async def handed_back(answers: list[asyncio.Future[InferResponse]]) -> None:
    """Wait until all these requests have been handed back."""
    for each in await asyncio.gather(*answers):
        assert (each.error.refused, each.error.status, each.error.retry_after_ms) == (True, 503, 1000)


async def test_what_waits_for_a_worker_that_died_is_handed_back_while_it_loads(instances: Instances) -> None:
    async with link_to(instances.a) as link:
        with Hold(instances.folder, "busy"):
            (running,) = hand_over(link, wait="busy")
            await until((instances.folder / "entered").exists)
            waiting = hand_over(link, 20)
            with Hold(instances.folder, "load"):
                os.kill(instances.a.worker(), signal.SIGKILL)
                await handed_back(waiting)
                assert link.is_away
                await handed_back(hand_over(link, 3))
                # It may have crashed the worker, and must not reach others.
                assert not running.done()
                await instances.seen_away()
                assert await instances.evals() == {instances.b.pid}
        assert int((await running).result_json) == instances.a.pid
        await until(lambda: not link.is_away)
    await instances.seen_back()


async def test_requests_wait_for_the_worker_of_an_only_instance(instances: Instances) -> None:
    instances.b.terminate()
    await asyncio.to_thread(instances.b.wait)
    assert await instances.eval() == instances.a.pid
    with Hold(instances.folder, "load"):
        with Hold(instances.folder, "busy"):
            async with link_to(instances.a) as link:
                hand_over(link, wait="busy")
                await until((instances.folder / "entered").exists)
                # These wait when the worker dies, and the others come while it loads.
                asking = [asyncio.create_task(instances.eval()) for _ in range(5)]
                os.kill(instances.a.worker(), signal.SIGKILL)
                await instances.logged("instance away")
        asking += [asyncio.create_task(instances.eval()) for _ in range(5)]
        done, _ = await asyncio.wait(asking, timeout=1)
        assert not done, "an answer came while the net was loaded"
    assert [await each for each in asking] == [instances.a.pid] * 10


async def test_what_waits_behind_a_call_that_hangs_is_handed_back(instances: Instances) -> None:
    async with link_to(instances.a) as link:
        with Hold(instances.folder, "busy"):
            (running,) = hand_over(link, wait="busy")
            await until((instances.folder / "entered").exists)
            await handed_back(hand_over(link, 20))
            assert link.is_away
            await instances.seen_away()
            assert await instances.evals() == {instances.b.pid}
            assert not running.done()
        assert int((await running).result_json) == instances.a.pid
        await until(lambda: not link.is_away)
    await instances.seen_back()


async def test_what_waits_for_a_worker_that_is_stopped_is_handed_back(instances: Instances) -> None:
    worker = instances.a.worker()
    os.kill(worker, signal.SIGSTOP)
    try:
        async with link_to(instances.a) as link:
            await handed_back(hand_over(link, 20))
            await instances.seen_away()
            assert await instances.evals() == {instances.b.pid}
            os.kill(worker, signal.SIGCONT)
            await until(lambda: not link.is_away)
        await instances.seen_back()
    finally:
        os.kill(worker, signal.SIGCONT)


async def test_a_call_that_runs_alone_keeps_nobody_waiting(instances: Instances) -> None:
    async with link_to(instances.a) as link:
        with Hold(instances.folder, "busy"):
            (running,) = hand_over(link, wait="busy")
            await until((instances.folder / "entered").exists)
            # Longer than a worker may answer nothing.
            await asyncio.sleep(1.5)
            assert not link.is_away
        await running


async def test_requests_to_a_stopped_built_in_net_are_answered_by_another_instance(registry: Registry) -> None:
    """A single request keeps no other waiting, so the instance does not go away; the gate asks the other one, too."""
    registry.publish("hedged", phase="production")
    gate = Gate([registry.address])
    with evaluator(registry, "hedged") as a, evaluator(registry, "hedged"):
        gate.start()
        try:
            await gate.eval("hedged")
            worker = a.worker()
            os.kill(worker, signal.SIGSTOP)
            try:
                while not any("request hedged" in line for line in gate.lines):
                    await gate.eval("hedged")
                # Every one of many callers is answered again and again.
                await asyncio.gather(*(evals(gate, "hedged", 20) for _ in range(12)))
            finally:
                # It has not been killed meanwhile.
                os.kill(worker, signal.SIGCONT)
        finally:
            gate.kill()
