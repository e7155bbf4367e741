"""What a running instance and a gate follow of the config, and what is said of the rest; all parts are real."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import grpc.aio
import pytest

from atserving import transport
from atserving.v1 import serving_pb2, serving_pb2_grpc
from atserving.v1.evaluator_pb2 import InferRequest
from atserving.v1.serving_pb2 import Resource
from tests.evaluator.calling import DIGIT, ask, connected, infer
from tests.processes import Gate, Registry, evaluator
from tests.registry.cli import Cli
from tests.waiting import PATIENCE_S, until, until_async

pytestmark = pytest.mark.slow


@pytest.fixture
def gate(registry: Registry) -> Iterator[Gate]:
    gate = Gate([registry.address])
    gate.start()
    yield gate
    gate.kill()


@pytest.fixture
def silent_url() -> Iterator[str]:
    """The URL of an image at a host that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/7.png"


async def given_up_s(gate: Gate, app: str, url: str) -> float:
    """Return how long the gate waits for an answer to a request for this URL."""
    async with transport.channel(gate.address) as channel:
        stub = serving_pb2_grpc.ServingServiceStub(channel)
        request = serving_pb2.EvalRequest(app=app, data=[Resource(uri=url)])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Eval(request, wait_for_ready=True, timeout=PATIENCE_S)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    said = re.search(r"did not answer within ([0-9.]+) s", caught.value.details() or "")
    assert said, caught.value.details()
    return float(said[1])


async def test_worker_settings_of_each_level_are_followed_without_a_restart(
    registry: Registry, gate: Gate, silent_url: str
) -> None:
    registry.publish("hot", phase="production", batch_size=8)
    with evaluator(registry, "hot", "v1", "--allow-network", "127.0.0.0/8") as process:

        async def answers() -> bool:
            return await gate.status("hot") is grpc.StatusCode.OK

        async def followed(most: int) -> None:
            await until(lambda: [each["capacity"] for each in registry.instances("hot")] == [most])

        await until_async(answers)
        worker = process.worker()
        try:
            # Each level overrides the one before it, and the built-in timeout is 30 s.
            for level, key in enumerate(("worker/default", "worker/app/hot/default", "worker/app/hot/release/v1"), 1):
                least_s = 0.3 * level
                settings = {"timeout": f"{300 * level}ms", "max_concurrent": 8 + level, "delay4batch": "0s"}
                registry.put(key, settings)
                await followed(8 + level)
                waited_s = 0.0
                # A gate may have the change a moment later.
                async with asyncio.timeout(PATIENCE_S):
                    while waited_s < least_s:
                        waited_s = await given_up_s(gate, "hot", silent_url)
                assert waited_s < 20
                registry.put(key, settings | {"max_concurrent": 18 + level, "delay4batch": f"{300 * level}ms"})
                await followed(18 + level)
                began_s = time.monotonic()
                assert (await infer(process, DIGIT)).result_json
                # Nobody else comes to fill the batch.
                assert time.monotonic() - began_s >= least_s
        finally:
            registry.delete("worker/default")
        assert process.worker() == worker


async def test_tasks_of_batches_run_at_once_when_no_more_may_come(registry: Registry) -> None:
    registry.publish("tasks", batch_size=8)
    registry.put("worker/app/tasks/default", {"max_concurrent": 8, "delay4batch": "1h"})
    with evaluator(registry, "tasks") as process:
        async with connected(process) as connection:
            request = InferRequest(data=[DIGIT])
            answers = await asyncio.gather(*(ask(connection, request, batched=True) for _ in range(6)))
        assert all(each.result_json for each in answers)


@pytest.mark.parametrize(
    "changed", [{"batch_size": 4}, {"custom_values": {"net": "classify"}}, {"file": "file:///other.tar"}]
)
async def test_content_that_needs_a_new_instance_is_said(registry: Registry, changed: dict[str, Any]) -> None:
    (field,) = changed
    app = f"cold-{field.replace('_', '-')}"
    registry.publish(app)
    cli = Cli(registry.address, app)
    with evaluator(registry, app) as process:
        assert cli.run("release", "show", app, "v1").err == ""
        registry.publish(app, **changed)
        await asyncio.to_thread(process.logged, event="instance outdated")
        said = "1 instance has loaded other content: start it again to apply this"
        await until(lambda: said in cli.run("release", "show", app, "v1").err)
        assert "outdated" in cli("ps", app)
        # The instance has what comes back.
        assert cli("release", "rollback", app)
        await until(lambda: "outdated" not in cli("ps", app))
