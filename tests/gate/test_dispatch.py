"""What the dispatcher promises, over real gRPC to evaluators that do as they are told."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import grpc.aio
import pytest

from atserving import transport
from atserving.config import AppMetadata, ConfigValue, Instance, Release, WorkerConfig, release_key
from atserving.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ServingError,
    Unauthenticated,
    Unavailable,
)
from atserving.v1 import evaluator_pb2, evaluator_pb2_grpc, serving_pb2
from evaluator.serving.stream import GateStream
from gate.admission import Caller
from gate.batch import run_batch
from gate.connection import EvaluatorConnection
from gate.dispatch import CallContext, Dispatcher, EvalResult, Task
from gate.router import LINGER_S, Router

Context = grpc.aio.ServicerContext[evaluator_pb2.ExchangeRequest, evaluator_pb2.ExchangeResponse]
FULL = evaluator_pb2.Error(code=429, status=429, message="full", retry_after_ms=1500, refused=True)
LEAVING = evaluator_pb2.Error(code=503, status=503, message="leaving", refused=True)


@dataclass
class Evaluator(evaluator_pb2_grpc.EvaluatorServiceServicer):
    """An evaluator that answers with its name, an error, or not at all."""

    name: str
    error: evaluator_pb2.Error | None = None
    hold: asyncio.Event | None = None
    die: Callable[[], object] | None = None
    seen: list[evaluator_pb2.InferRequest] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    four: asyncio.Event = field(default_factory=asyncio.Event)
    at_once: int = 0
    most_at_once: int = 0
    port: int = 0

    async def Exchange(  # type: ignore[override]
        self, request_iterator: AsyncIterator[evaluator_pb2.ExchangeRequest], context: Context
    ) -> None:
        await GateStream(self._infer).run(request_iterator, context.write)

    async def _infer(self, call: evaluator_pb2.Call) -> evaluator_pb2.InferResponse:
        request = call.request
        self.seen.append(request)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.entered.set()
        if self.at_once == 4:
            self.four.set()
        try:
            if self.die:
                self.die()
            if self.hold:
                await self.hold.wait()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.at_once -= 1
        if self.error:
            return evaluator_pb2.InferResponse(error=self.error)
        return evaluator_pb2.InferResponse(result_json=f'"{self.name}:{request.params_json}"')


class Mesh:
    """A dispatcher, and the evaluators it knows."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.later_s = 0.0
        self.router = Router(EvaluatorConnection, clock=lambda: time.monotonic() + self.later_s)
        self.synced = asyncio.Event()
        self.synced.set()
        self.dispatcher = Dispatcher(self.router, self.synced)
        self.put(release_key("app", "v1"), Release(name="app", version="v1", file="file:///x", phase="production"))

    def put(self, key: str, value: ConfigValue) -> None:
        self.router.apply({key: value}, set())

    def delete(self, key: str) -> None:
        self.router.apply({}, {key})

    async def add(self, evaluator: Evaluator, capacity: int = 8) -> grpc.aio.Server:
        server = transport.Server([])
        evaluator_pb2_grpc.add_EvaluatorServiceServicer_to_server(evaluator, server.grpc)
        evaluator.port = await server.start("127.0.0.1:0")
        self._stack.push_async_callback(server.stop, 0)
        self.enter(evaluator.name, evaluator.port, capacity)
        return server.grpc

    def enter(self, name: str, port: int, capacity: int = 8) -> None:
        one = Instance(app="app", version="v1", id=name, address=f"127.0.0.1:{port}", capacity=capacity)
        self.put(one.key, one)

    async def eval(self, timeout_s: float | None = None, **fields: str) -> str:
        call = CallContext("reqid", Caller(), deadline=None if timeout_s is None else time.monotonic() + timeout_s)
        return (await self.dispatcher.eval(task(**fields), call)).response.result_json


def task(app: str = "app", version: str = "", uri: str = "", params: str = "") -> Task:
    resource = serving_pb2.Resource(uri=uri) if uri else serving_pb2.Resource(body=b"image")
    return Task(app, version, evaluator_pb2.InferRequest(data=[resource], params_json=params))


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack)
        yield mesh
        for name in "abc":
            mesh.delete(f"/ava/serving/instance/app/v1/{name}")
        mesh.later_s = LINGER_S + 1
        for endpoint in mesh.router.expired():
            await endpoint.connection.close()


async def test_a_request_reaches_an_instance_and_its_answer_comes_back(mesh: Mesh) -> None:
    await mesh.add(Evaluator("a"))
    assert await mesh.eval(params='{"limit":9007199254740993}') == '"a:{"limit":9007199254740993}"'


async def test_a_refused_request_goes_to_another_instance(mesh: Mesh) -> None:
    for error in (FULL, LEAVING):
        await mesh.add(Evaluator("a", error))
        await mesh.add(Evaluator("b"))
        assert {await mesh.eval() for _ in range(20)} == {'"b:"'}


async def test_all_full_is_exhausted_with_the_instances_own_delay(mesh: Mesh) -> None:
    await mesh.add(Evaluator("a", FULL))
    await mesh.add(Evaluator("b", FULL))
    with pytest.raises(ResourceExhausted) as caught:
        await mesh.eval()
    assert caught.value.retry_after_s == 1.5


async def test_all_leaving_is_unavailable(mesh: Mesh) -> None:
    await mesh.add(Evaluator("a", LEAVING))
    with pytest.raises(Unavailable, match="no instance of app 'app' is ready"):
        await mesh.eval()


async def test_an_error_of_the_net_is_final(mesh: Mesh) -> None:
    bad_image = evaluator_pb2.Error(code=-3, status=400, message="bad image")
    first, second = Evaluator("a", bad_image), Evaluator("b", bad_image)
    await mesh.add(first)
    await mesh.add(second)
    with pytest.raises(ServingError) as caught:
        await mesh.eval()
    assert (caught.value.code, caught.value.status, caught.value.message) == (-3, 400, "bad image")
    assert len(first.seen) + len(second.seen) == 1


async def test_unreachable_instances_cost_nothing_but_a_retry(mesh: Mesh) -> None:
    for name in "bc":
        gone = Evaluator(name)
        server = await mesh.add(gone)
        await server.stop(0)
    await mesh.add(Evaluator("a"))
    assert {await mesh.eval() for _ in range(20)} == {'"a:"'}


async def test_a_request_lost_with_its_instance_runs_again_on_another(mesh: Mesh) -> None:
    lost = Evaluator("a", hold=asyncio.Event())
    server = await mesh.add(lost)
    asking = asyncio.create_task(mesh.eval())
    await lost.entered.wait()
    await mesh.add(Evaluator("b"))
    await server.stop(0)
    assert await asking == '"b:"'


async def test_a_request_that_takes_instances_down_does_not_go_round_them_all(mesh: Mesh) -> None:
    evaluators = [Evaluator(name, hold=asyncio.Event()) for name in "abc"]
    for evaluator in evaluators:
        server = await mesh.add(evaluator)
        evaluator.die = lambda server=server: asyncio.ensure_future(server.stop(0))  # type: ignore[misc]
    with pytest.raises(Unavailable, match="2 instances of app 'app' were lost under this request"):
        await mesh.eval()
    assert sum(len(each.seen) for each in evaluators) == 2


async def test_the_apps_timeout_ends_the_work_too(mesh: Mesh) -> None:
    slow = Evaluator("a", hold=asyncio.Event())
    await mesh.add(slow)
    mesh.put("/ava/serving/worker/default", WorkerConfig.model_validate({"timeout": "50ms"}))
    with pytest.raises(DeadlineExceeded, match="app 'app' did not answer within"):
        await mesh.eval()
    await slow.cancelled.wait()


async def test_a_callers_shorter_deadline_wins(mesh: Mesh) -> None:
    slow = Evaluator("a", hold=asyncio.Event())
    await mesh.add(slow)
    with pytest.raises(DeadlineExceeded):
        await mesh.eval(timeout_s=0.05)
    await slow.cancelled.wait()


async def test_a_caller_that_goes_takes_its_work_along(mesh: Mesh) -> None:
    slow = Evaluator("a", hold=asyncio.Event())
    await mesh.add(slow)
    asking = asyncio.create_task(mesh.eval())
    await slow.entered.wait()
    asking.cancel()
    await slow.cancelled.wait()
    assert mesh.router.pick(mesh.router.route("app", "")).in_flight == 0


async def test_what_can_not_be_served_is_refused_before_an_instance_is_asked(mesh: Mesh) -> None:
    evaluator = Evaluator("a")
    await mesh.add(evaluator)
    for error, fields in (
        (NotFound, {"app": "nothing"}),
        (NotFound, {"app": "../etc"}),
        (NotFound, {"version": "v9"}),
        (InvalidArgument, {"app": ""}),
        (InvalidArgument, {"uri": "file:///etc/passwd"}),
        (InvalidArgument, {"uri": "qiniu://no-bucket"}),
    ):
        with pytest.raises(error):
            await mesh.eval(**fields)
    empty = Task("app", "", evaluator_pb2.InferRequest())
    with pytest.raises(InvalidArgument, match="no data given"):
        await mesh.dispatcher.eval(empty, CallContext("reqid", Caller()))
    assert not evaluator.seen


async def test_an_app_that_is_not_public_wants_credentials(mesh: Mesh) -> None:
    await mesh.add(Evaluator("a"))
    for metadata in ({"public": False}, {"owner": {"uid": 7}}, {"user_whitelist": [7]}):
        mesh.put("/ava/serving/app/metadata/app", AppMetadata.model_validate(metadata))
        with pytest.raises(Unauthenticated, match="app 'app' is not public"):
            await mesh.eval()
    mesh.put("/ava/serving/app/metadata/app", AppMetadata(public=True))
    assert await mesh.eval() == '"a:"'


async def test_nobody_speaks_for_another_uid(mesh: Mesh) -> None:
    evaluator = Evaluator("a")
    await mesh.add(evaluator)
    await mesh.eval(uri="qiniu://42@z0/bucket/a/key")
    assert evaluator.seen[0].data[0].uri == "qiniu://z0/bucket/a/key"


async def test_a_batch_keeps_order_and_lets_each_item_fail_alone(mesh: Mesh) -> None:
    await mesh.add(Evaluator("a"))
    refused = InvalidArgument("not a task")
    tasks: list[Task | ServingError] = [task(params=str(n)) for n in range(40)]
    tasks[7], tasks[11] = refused, task(app="nothing")
    results = await run_batch(mesh.dispatcher, tasks, CallContext("reqid", Caller()), concurrency=4)
    said = [each.response.result_json if isinstance(each, EvalResult) else each.code for each in results]
    expected: list[str | int] = [f'"a:{n}"' for n in range(40)]
    expected[7], expected[11] = 400, 404
    assert said == expected


async def test_a_batch_runs_concurrently_but_not_all_at_once(mesh: Mesh) -> None:
    evaluator = Evaluator("a", hold=asyncio.Event())
    await mesh.add(evaluator)
    call = CallContext("reqid", Caller())
    async with asyncio.TaskGroup() as group:
        running = group.create_task(run_batch(mesh.dispatcher, [task() for _ in range(30)], call, concurrency=4))
        await evaluator.four.wait()
        assert evaluator.hold
        evaluator.hold.set()
    assert Counter(type(each) for each in running.result()) == {EvalResult: 30}
    assert evaluator.most_at_once == 4
