"""A gate stays below the memory of its pod, whatever callers leave unfinished and nets answer, and serves others."""

from __future__ import annotations

import asyncio
import base64
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import cast

import grpc.aio
import pytest
import pytest_asyncio
from google.api import httpbody_pb2

from atserving import transport
from atserving.v1 import edge_pb2, serving_pb2, serving_pb2_grpc
from reliability.uploads import Uploads
from tests.envoy.rig import TYPED_EVAL
from tests.evaluator.digits import digits_tar
from tests.pod_memory import PodMemory, forget_most
from tests.processes import Gate, evaluator, running_registry
from tests.waiting import until, until_async

pytestmark = pytest.mark.asyncio(loop_scope="module")

UPLOADS = 60
BODY_BYTES = 19 << 20
TASKS = 60
ANSWER_MIB = 8
LARGE_REQUESTS, ROUNDS = 16, 2
MOST_MIB = 45
"""What the answers of a batch may be together."""

SIZED = b"""
def net_init(cfg): return {}
def net_inference(model, args):
    return [{"code": 0, "message": "", "result_file": bytes(req["params"]["bytes"])} for req in args["reqs"]]
"""


@pytest.fixture(scope="module")
def memory() -> Iterator[PodMemory]:
    with PodMemory("gate") as memory:
        yield memory


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gate(memory: PodMemory, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gate]:
    folder: Path = tmp_path_factory.mktemp("mesh")
    with running_registry(folder) as registry:
        registry.publish("sized", phase="production", file=digits_tar(folder / "sized.tar", **{"net.py": SIZED}))
        gate = Gate([registry.address])
        gate.command = memory.command(gate.command)
        gate.start()
        try:
            with evaluator(registry, "sized"):
                await until_async(lambda: answers(gate), grpc.aio.AioRpcError, what="the gate serves")
                yield gate
        finally:
            gate.kill()


def task(size: int) -> serving_pb2.EvalRequest:
    """Return a request whose answer has this size."""
    data = [serving_pb2.Resource(uri="data:;base64,AA==")]
    return serving_pb2.EvalRequest(app="sized", data=data, params_json=f'{{"bytes": {size}}}')


async def answers(gate: Gate, size: int = 10) -> bool:
    """Ask as another caller; return whether the answer has this size."""
    async with transport.channel(gate.address) as channel:
        answer = await serving_pb2_grpc.ServingServiceStub(channel).Eval(task(size))
        return len(answer.stream) == size


async def test_uploads_that_never_end_are_bounded(gate: Gate, memory: PodMemory) -> None:
    forget_most(gate)
    host, port = gate.address.split(":")
    connection = await asyncio.open_connection(host, int(port))
    uploads = await Uploads.start(connection, TYPED_EVAL, "application/grpc", UPLOADS, BODY_BYTES)
    await until(uploads.settled, what="every upload has been sent")
    assert 0 < uploads.answered < UPLOADS
    assert await answers(gate)
    memory.check(gate)
    await uploads.close()
    await until_async(lambda: answers(gate, 32 << 20), grpc.aio.AioRpcError, what="the gate holds them no more")


@pytest.mark.parametrize("batches", [1, 4])
async def test_the_answers_of_batches_are_bounded(gate: Gate, memory: PodMemory, batches: int) -> None:
    forget_most(gate)
    size = ANSWER_MIB << 20
    async with transport.channel(gate.address) as channel:
        batch = serving_pb2_grpc.ServingServiceStub(channel).Batch
        request = serving_pb2.BatchRequest(tasks=[task(size)] * TASKS)
        waiting = [asyncio.ensure_future(batch(request)) for _ in range(batches)]
        while not all(each.done() for each in waiting):
            assert await answers(gate)
        answered = await asyncio.gather(*waiting, return_exceptions=True)
        whole = [each for each in answered if isinstance(each, serving_pb2.BatchResponse)]
        assert whole
        for each in answered:
            # A batch that arrives when others have filled the gate is refused as a whole.
            if not isinstance(each, serving_pb2.BatchResponse):
                assert isinstance(each, grpc.aio.AioRpcError)
                assert each.code() is grpc.StatusCode.UNAVAILABLE
        for batch_response in whole:
            told = Counter((result.code, len(result.stream)) for result in batch_response.results)
            assert told.keys() <= {(0, size), (413, 0), (503, 0)}, told
            assert told[0, size] <= MOST_MIB // ANSWER_MIB
            if batches == 1:
                assert told[0, size] == MOST_MIB // ANSWER_MIB
                refused = {result.message for result in batch_response.results if result.code == 413}
                assert refused == {f"the answers of the batch are larger than {MOST_MIB} MiB together"}
    memory.check(gate)


async def test_large_requests_that_fail_are_bounded(gate: Gate, memory: PodMemory) -> None:
    """Nothing keeps them once they have failed."""
    forget_most(gate)
    # Larger than a resource may be, which the instance finds out.
    uri = b"data:;base64," + base64.b64encode(bytes(15_000_000))
    body = httpbody_pb2.HttpBody(content_type="application/json", data=b'{"data": {"uri": "%s"}}' % uri)
    message = edge_pb2.EdgeEvalRequest(app="sized", body=body).SerializeToString()
    async with transport.channel(gate.address) as channel:
        call = channel.unary_unary("/atserving.v1.EdgeService/Eval", None, None)
        for _ in range(ROUNDS):
            errors = await asyncio.gather(*(call(message) for _ in range(LARGE_REQUESTS)), return_exceptions=True)
            # The client shows the answer to a REST caller as an error: refused by the instance, or by the gate, which
            # is full, or has too much for the app.
            told = Counter(str(each.details()).rpartition(" ")[2] for each in cast(list[grpc.aio.AioRpcError], errors))
            assert told["400"]
            assert told.keys() <= {"400", "429", "503"}
            assert await answers(gate)
    memory.check(gate)
