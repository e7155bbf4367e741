"""The dispatcher admits, routes and retries requests. Its connections are real; the tests script the evaluators."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest

from atserving.config import (
    AppMetadata,
    AppRouting,
    ConfigValue,
    Release,
    WorkerConfig,
    app_routing_key,
    release_key,
    validate,
)
from atserving.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ServingError,
    Unauthenticated,
    Unavailable,
)
from atserving.held import HeldBytes
from atserving.http2_stream import Headers
from atserving.v1 import evaluator_pb2, serving_pb2
from gate import batch, dispatch
from gate.admission import Caller
from gate.batch import run_batch
from gate.connection import EvaluatorConnection
from gate.dispatch import CallContext, Dispatcher, EvalResult, Task
from gate.router import Router
from gate.shadow import Shadows
from tests.instance import ScriptedInstance
from tests.waiting import until

FULL = evaluator_pb2.Error(code=429, status=429, message="full", retry_after_ms=1500, refused=True)
HELD = HeldBytes(1 << 30)
FULL_FOR_LONG = evaluator_pb2.Error(code=429, status=429, message="full", retry_after_ms=60_000, refused=True)
DRAINING = evaluator_pb2.Error(code=503, status=503, message="draining", refused=True)


def json_of(result: EvalResult) -> str:
    """Return the JSON document of a small result."""
    assert isinstance(result.response, evaluator_pb2.InferResponse)
    return result.response.result_json


@dataclass
class Evaluator:
    """An evaluator that replies with its name or with an error, at once or when ``hold`` is set."""

    name: str
    error: evaluator_pb2.Error | None = None
    stream: bytes | None = None
    hold: asyncio.Event | None = None
    on_request: Callable[[], object] | None = None
    received: list[evaluator_pb2.InferRequest] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    four_in_flight: asyncio.Event = field(default_factory=asyncio.Event)
    in_flight: int = 0
    most_in_flight: int = 0

    async def infer(self, request: evaluator_pb2.InferRequest) -> evaluator_pb2.InferResponse:
        self.received.append(request)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.entered.set()
        if self.in_flight == 4:
            self.four_in_flight.set()
        try:
            if self.on_request:
                self.on_request()
            if self.hold:
                await self.hold.wait()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.in_flight -= 1
        if self.error:
            return evaluator_pb2.InferResponse(error=self.error)
        if self.stream:
            return evaluator_pb2.InferResponse(stream=self.stream)
        return evaluator_pb2.InferResponse(result_json=f'"{self.name}:{request.params_json}"')


class Mesh:
    """A dispatcher with its config and evaluators."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.instance_keys: set[str] = set()
        self.later_s = 0.0
        connect = partial(EvaluatorConnection, connect_timeout_s=60)
        self.router = Router(connect, clock=lambda: time.monotonic() + self.later_s)
        self.synced = asyncio.Event()
        self.synced.set()
        self.held = HeldBytes(64 << 20)
        self.shadows = Shadows(self.router, self.held)
        self.dispatcher = Dispatcher(self.router, self.synced, self.shadows)
        self.put(release_key("app", "v1"), Release(name="app", version="v1", file="file:///x", phase="production"))

    def put(self, key: str, value: ConfigValue) -> None:
        self.router.apply({key: value}, set())

    def delete(self, key: str) -> None:
        self.router.apply({}, {key})

    async def add(
        self, evaluator: Evaluator, version: str = "v1", *, app: str = "app", built_in: bool = False
    ) -> ScriptedInstance:
        """Start an evaluator and register its instance."""
        server = ScriptedInstance(evaluator.infer, app, version, evaluator.name, built_in=built_in)
        instance = await server.start()
        self._stack.push_async_callback(server.stop)
        self.put(instance.key, instance)
        self.instance_keys.add(instance.key)
        return server

    async def eval(self, timeout_s: float | None = None, *, uri: str = "", params: str = "") -> str:
        """Return the JSON result of a task."""
        call = CallContext("reqid", Caller(), deadline=None if timeout_s is None else time.monotonic() + timeout_s)
        return json_of(await self.dispatcher.eval(task(uri=uri, params=params), call))


def task(app: str = "app", version: str = "", uri: str = "", params: str = "") -> Task:
    resource = serving_pb2.Resource(uri=uri) if uri else serving_pb2.Resource(body=b"image")
    return Task(app, version, evaluator_pb2.InferRequest(data=[resource], params_json=params))


@asynccontextmanager
async def running_mesh() -> AsyncIterator[Mesh]:
    """Yield a mesh, and close its connections at the end."""
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack)
        yield mesh
        for key in mesh.instance_keys:
            mesh.delete(key)
        for pool in mesh.router._left.values():
            for endpoint in list(pool.values()):
                mesh.router.refused(endpoint)
        for endpoint in mesh.router.expired():
            await endpoint.connection.close()


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with running_mesh() as mesh:
        yield mesh


async def test_request_reaches_an_instance_and_its_result_returns(mesh: Mesh) -> None:
    await mesh.add(Evaluator("a"))
    assert await mesh.eval(params='{"limit":9007199254740993}') == '"a:{"limit":9007199254740993}"'


async def test_request_waits_for_the_first_config_of_a_gate(mesh: Mesh) -> None:
    await mesh.add(Evaluator("a"))
    mesh.synced.clear()
    asking = asyncio.create_task(mesh.eval())
    await asyncio.sleep(0)
    assert not asking.done()
    mesh.synced.set()
    assert await asking == '"a:"'


async def test_gate_without_a_config_is_unavailable_after_a_while(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MAX_SYNC_S", 0.01)
    mesh.synced.clear()
    with pytest.raises(Unavailable, match="this gate has no config yet"):
        await mesh.eval()


async def test_refused_request_is_retried_on_another_instance(mesh: Mesh) -> None:
    for error in (FULL, DRAINING):
        await mesh.add(Evaluator("a", error))
        await mesh.add(Evaluator("b"))
        assert {await mesh.eval() for _ in range(20)} == {'"b:"'}


async def test_full_instances_give_resource_exhausted_with_their_retry_delay(mesh: Mesh) -> None:
    await mesh.add(Evaluator("a", FULL))
    await mesh.add(Evaluator("b", FULL))
    with pytest.raises(ResourceExhausted) as caught:
        await mesh.eval()
    assert caught.value.retry_after_s == 1.5


async def test_draining_instances_make_their_app_unavailable(mesh: Mesh) -> None:
    await mesh.add(Evaluator("a", DRAINING))
    with pytest.raises(Unavailable, match="no instance of app 'app' is ready"):
        await mesh.eval()


async def test_error_of_the_net_is_not_retried(mesh: Mesh) -> None:
    bad_image = evaluator_pb2.Error(code=-3, status=400, message="bad image")
    first, second = Evaluator("a", bad_image), Evaluator("b", bad_image)
    await mesh.add(first)
    await mesh.add(second)
    with pytest.raises(ServingError) as caught:
        await mesh.eval()
    assert (caught.value.code, caught.value.status, caught.value.message) == (-3, 400, "bad image")
    assert len(first.received) + len(second.received) == 1


async def test_request_to_an_unreachable_instance_is_retried_on_another(mesh: Mesh) -> None:
    for name in "bc":
        server = await mesh.add(Evaluator(name))
        await server.stop()
    await mesh.add(Evaluator("a"))
    assert {await mesh.eval() for _ in range(20)} == {'"a:"'}


async def test_request_in_flight_on_a_lost_instance_is_retried_on_another(mesh: Mesh) -> None:
    lost = Evaluator("a", hold=asyncio.Event())
    server = await mesh.add(lost)
    request = asyncio.create_task(mesh.eval())
    await lost.entered.wait()
    await mesh.add(Evaluator("b"))
    await server.stop()
    assert await request == '"b:"'


async def test_retry_follows_a_promotion(mesh: Mesh) -> None:
    old = Evaluator("a", DRAINING, hold=asyncio.Event())
    await mesh.add(old)
    request = asyncio.create_task(mesh.eval())
    await old.entered.wait()
    await mesh.add(Evaluator("b"))
    await mesh.add(Evaluator("c"), "v2")
    for version, phase in (("v1", "staging"), ("v2", "production")):
        fields = {"name": "app", "version": version, "file": "file:///x", "phase": phase}
        mesh.put(release_key("app", version), validate(Release, fields))
    assert old.hold
    old.hold.set()
    assert await request == '"c:"'


async def test_request_that_crashes_instances_is_tried_on_two_at_most(mesh: Mesh) -> None:
    evaluators = [Evaluator(name, hold=asyncio.Event()) for name in "abc"]
    for evaluator in evaluators:
        server = await mesh.add(evaluator)
        evaluator.on_request = lambda server=server: asyncio.ensure_future(server.stop())
    with pytest.raises(Unavailable, match="2 instances of app 'app' were lost under this request") as lost:
        await mesh.eval()
    assert lost.value.version == "v1"
    assert sum(len(each.received) for each in evaluators) == 2


async def test_apps_timeout_cancels_the_request_at_the_instance(mesh: Mesh) -> None:
    slow = Evaluator("a", hold=asyncio.Event())
    await mesh.add(slow)
    timeout_ms = 25
    # On a busy machine a deadline may pass before the instance gets the request.
    while not slow.entered.is_set():
        timeout_ms *= 2
        mesh.put("/ava/serving/worker/default", validate(WorkerConfig, {"timeout": f"{timeout_ms}ms"}))
        with pytest.raises(DeadlineExceeded, match="app 'app' did not answer within") as late:
            await mesh.eval()
    await slow.cancelled.wait()
    assert late.value.version == "v1"


async def test_callers_shorter_deadline_wins(mesh: Mesh) -> None:
    slow = Evaluator("a", hold=asyncio.Event())
    await mesh.add(slow)
    timeout_s = 0.025
    while not slow.entered.is_set():
        timeout_s *= 2
        with pytest.raises(DeadlineExceeded):
            await mesh.eval(timeout_s=timeout_s)
    await slow.cancelled.wait()


async def test_cancelled_request_is_cancelled_at_the_instance(mesh: Mesh) -> None:
    slow = Evaluator("a", hold=asyncio.Event())
    await mesh.add(slow)
    request = asyncio.create_task(mesh.eval())
    await slow.entered.wait()
    request.cancel()
    await slow.cancelled.wait()
    assert mesh.router.pick(mesh.router.route("app", "")).in_flight == 0


async def test_invalid_request_reaches_no_instance(mesh: Mesh) -> None:
    evaluator = Evaluator("a")
    await mesh.add(evaluator)
    for error, message, invalid in (
        (NotFound, "unknown app", task(app="nothing")),
        (NotFound, "unknown app", task(app="../etc")),
        (NotFound, "no version", task(version="v9")),
        (InvalidArgument, "no app given", task(app="")),
        (InvalidArgument, "file", task(uri="file:///etc/passwd")),
        (InvalidArgument, "qiniu", task(uri="qiniu://no-bucket")),
        (InvalidArgument, "no data given", Task("app", "", evaluator_pb2.InferRequest())),
        (NotFound, "unknown version: its name", Task("app", "v" * 100_000, evaluator_pb2.InferRequest())),
    ):
        with pytest.raises(error, match=message):
            await mesh.dispatcher.eval(invalid, CallContext("reqid", Caller()))
    assert not evaluator.received


@pytest.mark.parametrize("key", ["/ava/serving/app/metadata/app", "/ava/serving/app/default/metadata"])
async def test_versions_of_a_closed_app_cannot_be_guessed(mesh: Mesh, key: str) -> None:
    mesh.put(key, AppMetadata(public=False))
    for version in ("", "v1", "v9", "no name of a version"):
        with pytest.raises(Unauthenticated, match="app 'app' is not public"):
            await mesh.dispatcher.eval(task(version=version), CallContext("reqid", Caller()))
    mesh.put(key, AppMetadata(public=True))
    with pytest.raises(NotFound, match="app 'app' has no version 'v9'"):
        await mesh.dispatcher.eval(task(version="v9"), CallContext("reqid", Caller()))


async def test_app_that_is_not_public_requires_credentials(mesh: Mesh) -> None:
    await mesh.add(Evaluator("a"))
    for metadata in ({"public": False}, {"owner": {"uid": 7}}, {"user_whitelist": [7]}, {"group_whitelist": ["a"]}):
        mesh.put("/ava/serving/app/metadata/app", validate(AppMetadata, metadata))
        with pytest.raises(Unauthenticated, match="app 'app' is not public"):
            await mesh.eval()
    mesh.put("/ava/serving/app/metadata/app", AppMetadata(public=True))
    assert await mesh.eval() == '"a:"'


async def test_uid_that_a_caller_wrote_into_a_uri_is_removed(mesh: Mesh) -> None:
    evaluator = Evaluator("a")
    await mesh.add(evaluator)
    await mesh.eval(uri="qiniu://42@z0/bucket/a/key")
    assert evaluator.received[0].data[0].uri == "qiniu://z0/bucket/a/key"


async def test_a_gate_that_has_lost_every_link_connects_again_before_it_refuses(mesh: Mesh) -> None:
    """So it is after the gate stood still: every instance has given it up."""
    evaluators = [Evaluator(name, hold=asyncio.Event()) for name in "ab"]
    servers = [await mesh.add(each) for each in evaluators]
    async with asyncio.TaskGroup() as group:
        asking = [group.create_task(mesh.eval()) for _ in range(6)]
        await until(lambda: sum(each.in_flight for each in evaluators) == 6)
        for each in evaluators:
            each.hold = None
        for server in servers:
            server.links.abort()
    assert {each.result() for each in asking} <= {'"a:"', '"b:"'}


async def test_an_instance_that_is_full_is_not_asked_again_at_once(mesh: Mesh) -> None:
    evaluator = Evaluator("a", error=FULL_FOR_LONG)
    await mesh.add(evaluator)
    for _ in range(5):
        with pytest.raises(ResourceExhausted):
            await mesh.eval()
    assert len(evaluator.received) == 1
    evaluator.error = None
    # It has other places for those that fetch.
    assert await mesh.eval(uri="http://host/a") == '"a:"'
    with pytest.raises(ResourceExhausted):
        await mesh.eval()
    # Its word counts for a second at most.
    mesh.later_s = 1.1
    evaluator.error = None
    assert await mesh.eval() == '"a:"'


async def test_an_instance_is_asked_again_once_a_request_of_the_gate_is_done(mesh: Mesh) -> None:
    evaluator = Evaluator("a", hold=asyncio.Event())
    await mesh.add(evaluator)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(mesh.eval())
        await evaluator.entered.wait()
        hold, evaluator.hold, evaluator.error = evaluator.hold, None, FULL_FOR_LONG
        with pytest.raises(ResourceExhausted):
            await mesh.eval()
        evaluator.error = None
        with pytest.raises(ResourceExhausted):
            await mesh.eval()
        assert hold
        hold.set()
        await first
        assert await mesh.eval() == '"a:"'


async def test_requests_that_wait_for_a_slow_host_keep_no_others_from_the_net(mesh: Mesh) -> None:
    slow = asyncio.Event()
    waiting = 0

    async def infer(request: evaluator_pb2.InferRequest) -> evaluator_pb2.InferResponse:
        nonlocal waiting
        if request.data[0].HasField("uri"):
            waiting += 1
            await slow.wait()
        return evaluator_pb2.InferResponse(result_json="1")

    server = ScriptedInstance(infer, "app", "v1", "a")
    instance = await server.start()
    mesh.put(instance.key, instance)
    try:
        async with asyncio.TaskGroup() as group:
            call = CallContext("reqid", Caller())
            tasks = [task(uri=f"http://slow/{n}") for n in range(40)]
            group.create_task(run_batch(mesh.dispatcher, tasks, call, 32, HELD))
            # The batch leaves a quarter of the eight places.
            await until(lambda: waiting == 6)
            alone = [group.create_task(mesh.eval(uri="http://slow/alone")) for _ in range(2)]
            await until(lambda: waiting == 8)
            for _ in range(20):
                assert await mesh.eval() == "1"
            with pytest.raises(ResourceExhausted):
                await mesh.eval(uri="http://other/")
            assert not any(each.done() for each in alone)
            slow.set()
    finally:
        mesh.delete(instance.key)
        await server.stop()


async def test_batch_keeps_the_order_and_each_task_fails_alone(mesh: Mesh) -> None:
    await mesh.add(Evaluator("a"))
    refused = InvalidArgument("not a task")
    tasks: list[Task | ServingError] = [task(params=str(n)) for n in range(40)]
    tasks[7], tasks[11] = refused, task(app="nothing")
    results = await run_batch(mesh.dispatcher, tasks, CallContext("reqid", Caller()), 4, HELD)
    outcomes = [json_of(each) if isinstance(each, EvalResult) else each.code for each in results]
    expected: list[str | int] = [f'"a:{n}"' for n in range(40)]
    expected[7], expected[11] = 400, 404
    assert outcomes == expected


async def test_batch_runs_as_many_tasks_at_once_as_its_concurrency(mesh: Mesh) -> None:
    evaluator = Evaluator("a", hold=asyncio.Event())
    await mesh.add(evaluator)
    call = CallContext("reqid", Caller())
    async with asyncio.TaskGroup() as group:
        running = group.create_task(run_batch(mesh.dispatcher, [task() for _ in range(30)], call, 4, HELD))
        await evaluator.four_in_flight.wait()
        assert evaluator.hold
        evaluator.hold.set()
    assert Counter(type(each) for each in running.result()) == {EvalResult: 30}
    assert evaluator.most_in_flight == 4


async def test_a_batch_counts_its_tasks_as_held(mesh: Mesh) -> None:
    evaluator = Evaluator("a", hold=asyncio.Event())
    await mesh.add(evaluator)
    call, held = CallContext("reqid", Caller()), HeldBytes(1 << 20)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(run_batch(mesh.dispatcher, [task() for _ in range(300)], call, 4, held))
        await evaluator.four_in_flight.wait()
        with pytest.raises(Unavailable, match="the gate holds as many bytes as it may"):
            await run_batch(mesh.dispatcher, [task() for _ in range(300)], call, 4, held)
        assert evaluator.hold
        evaluator.hold.set()
    assert len(running.result()) == 300
    assert held.held == 0


async def test_tasks_that_fail_at_once_let_others_go_on(mesh: Mesh) -> None:
    await mesh.add(Evaluator("a"))
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    going_on = asyncio.create_task(other())
    tasks = [task(app="nothing") for _ in range(100)]
    results = await run_batch(mesh.dispatcher, tasks, CallContext("reqid", Caller()), 1, HELD)
    assert {each.code for each in results if isinstance(each, ServingError)} == {404}
    assert turns >= len(tasks)
    going_on.cancel()


async def test_many_batches_run_fewer_tasks_each(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_MOST_RUNNING", 8)
    started: Counter[str] = Counter()

    async def evaluate(_: Task, call: CallContext) -> EvalResult:
        started[call.reqid] += 1
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(mesh.dispatcher, "eval", evaluate)
    names = [str(number) for number in range(10)]
    tasks = [task() for _ in range(30)]
    batches = [
        asyncio.create_task(run_batch(mesh.dispatcher, tasks, CallContext(name, Caller()), 4, HELD)) for name in names
    ]
    await until(lambda: len(started) == len(names))
    assert [started[name] for name in names] == [4, 4, 2, 2, 1, 1, 1, 1, 1, 1]
    for each in batches:
        each.cancel()
    await asyncio.gather(*batches, return_exceptions=True)


async def test_batches_share_a_full_instance_and_leave_room_to_others(mesh: Mesh) -> None:
    evaluator = Evaluator("a", hold=asyncio.Event())
    await mesh.add(evaluator)
    call = CallContext("reqid", Caller())
    async with asyncio.TaskGroup() as group:
        batches = [
            group.create_task(run_batch(mesh.dispatcher, [task() for _ in range(30)], call, 16, HELD)) for _ in range(4)
        ]
        await until(lambda: evaluator.in_flight == 6)
        alone = group.create_task(mesh.eval())
        await until(lambda: evaluator.in_flight == 7)
        assert evaluator.hold
        evaluator.hold.set()
    assert alone.result() == '"a:"'
    assert Counter(type(each) for batch in batches for each in batch.result()) == {EvalResult: 120}
    assert evaluator.most_in_flight == 7


async def test_a_batch_without_a_place_is_told_that_the_instances_are_full(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_PATIENCE_S", 0.05)
    evaluator = Evaluator("a", hold=asyncio.Event())
    await mesh.add(evaluator)
    async with asyncio.TaskGroup() as group:
        others = [group.create_task(mesh.eval()) for _ in range(6)]
        await until(lambda: evaluator.in_flight == 6)
        results = await run_batch(mesh.dispatcher, [task() for _ in range(20)], CallContext("reqid", Caller()), 4, HELD)
        assert [each.code if isinstance(each, ServingError) else 0 for each in results] == [429] * 20
        assert evaluator.hold
        evaluator.hold.set()
    assert [each.result() for each in others] == ['"a:"'] * 6


async def test_answers_of_a_batch_are_bounded_and_counted(mesh: Mesh) -> None:
    """Sixty answers of 8 MiB took 2.5 GiB, and the batch failed as a whole."""
    evaluator = Evaluator("a", stream=bytes(8 << 20))
    await mesh.add(evaluator)
    held = HeldBytes(1 << 30)
    results = await run_batch(mesh.dispatcher, [task() for _ in range(60)], CallContext("reqid", Caller()), 4, held)
    answered = [each for each in results if isinstance(each, EvalResult)]
    assert len(answered) == 5
    failed = {(each.code, each.message) for each in results if isinstance(each, ServingError)}
    assert failed == {(413, "the answers of the batch are larger than 45 MiB together")}
    # Those that ran when it was full.
    assert len(evaluator.received) < 12
    assert held.held == 0


async def test_answers_of_a_batch_that_the_gate_can_not_hold_fail_alone(mesh: Mesh) -> None:
    await mesh.add(Evaluator("a", stream=bytes(1 << 20)))
    # Large answers may take three quarters of it, a little less than three of these.
    held = HeldBytes((4 << 20) - 4)
    results = await run_batch(mesh.dispatcher, [task() for _ in range(5)], CallContext("reqid", Caller()), 2, held)
    assert Counter(each.code if isinstance(each, ServingError) else 0 for each in results) == {0: 2, 503: 3}
    assert held.held == 0


async def test_a_full_app_keeps_no_task_of_another_waiting(mesh: Mesh) -> None:
    full = Evaluator("a", hold=asyncio.Event())
    await mesh.add(full)
    mesh.put(release_key("other", "v1"), Release(name="other", version="v1", file="file:///x", phase="production"))
    answered = (other := Evaluator("b")).received
    free = ScriptedInstance(other.infer, "other", "v1", "b")
    instance = await free.start()
    mesh.put(instance.key, instance)
    async with asyncio.TaskGroup() as group:
        others = [group.create_task(mesh.eval()) for _ in range(6)]
        await until(lambda: full.in_flight == 6)
        tasks = [*(task() for _ in range(8)), *(task(app="other") for _ in range(2))]
        results = group.create_task(run_batch(mesh.dispatcher, tasks, CallContext("reqid", Caller()), 4, HELD))
        # They are answered while every task before them still waits.
        await until(lambda: len(answered) == 2)
        assert full.hold
        full.hold.set()
    assert all(isinstance(each, EvalResult) for each in results.result())
    assert [each.result() for each in others] == ['"a:"'] * 6
    await free.stop()


async def two_versions(mesh: Mesh, *, first: Evaluator, second: Evaluator) -> None:
    """Let two versions share the requests evenly."""
    for version, evaluator in (("v1", first), ("v2", second)):
        fields = {"name": "app", "version": version, "file": "file:///x", "phase": "production", "weight": 1}
        mesh.put(release_key("app", version), validate(Release, fields))
        await mesh.add(evaluator, version)


async def test_a_version_that_refuses_its_turns_as_full_makes_up_for_them(mesh: Mesh) -> None:
    full = Evaluator("a", FULL)
    await two_versions(mesh, first=full, second=Evaluator("b"))
    answers = []
    for _ in range(10):
        answers.append(await mesh.eval())
        mesh.later_s += 2
    assert set(answers) == {'"b:"'}
    refused = len(full.received)
    assert refused > 1
    full.error = None
    answers += [await mesh.eval() for _ in range(30)]
    assert Counter(answers) == {'"a:"': 20, '"b:"': 20}


async def test_a_version_that_fails_its_turns_does_not_make_up_for_them(mesh: Mesh) -> None:
    draining = Evaluator("a", DRAINING)
    await two_versions(mesh, first=draining, second=Evaluator("b"))
    assert {await mesh.eval() for _ in range(10)} == {'"b:"'}
    assert len(draining.received) == 5
    draining.error = None
    assert Counter([await mesh.eval() for _ in range(30)]) == {'"a:"': 15, '"b:"': 15}


def keyed(key: bytes, header: str = "x-serving-key") -> CallContext:
    return CallContext("reqid", Caller(), headers=Headers([(header, key)]))


async def test_a_request_with_a_key_stays_on_one_version(mesh: Mesh) -> None:
    await two_versions(mesh, first=Evaluator("a"), second=Evaluator("b"))
    versions = set()
    for key in (b"a", b"b", b"c", b"d", b"\xff"):
        answered = {(await mesh.dispatcher.eval(task(), keyed(key))).version for _ in range(10)}
        assert len(answered) == 1
        versions |= answered
        for version in ("v1", "v2"):
            assert (await mesh.dispatcher.eval(task(version=version), keyed(key))).version == version
    assert versions == {"v1", "v2"}
    ignored = Counter([(await mesh.dispatcher.eval(task(), keyed(b"a", "x-user"))).version for _ in range(10)])
    assert ignored == {"v1": 5, "v2": 5}
    mesh.put(app_routing_key("app"), validate(AppRouting, {"key_header": "x-user"}))
    assert len({(await mesh.dispatcher.eval(task(), keyed(b"a", "x-user"))).version for _ in range(10)}) == 1


async def test_a_key_of_a_batch_is_that_of_its_tasks_without_a_version(mesh: Mesh) -> None:
    await two_versions(mesh, first=Evaluator("a"), second=Evaluator("b"))
    for key in (b"a", b"b", b"c", b"d"):
        alone = await mesh.dispatcher.eval(task(), keyed(key))
        tasks = [task(), task(version="v1"), task(version="v2"), task()]
        results = await run_batch(mesh.dispatcher, tasks, keyed(key), 2, HELD)
        assert [getattr(each, "version", each) for each in results] == [alone.version, "v1", "v2", alone.version]


async def test_a_key_leaves_its_version_if_that_drains_but_not_if_it_is_full(mesh: Mesh) -> None:
    first, second = Evaluator("a"), Evaluator("b")
    await two_versions(mesh, first=first, second=second)
    own, other = first, second
    if (await mesh.dispatcher.eval(task(), keyed(b"key"))).version == "v2":
        own, other = second, first
    own.error = FULL
    with pytest.raises(ResourceExhausted):
        await mesh.dispatcher.eval(task(), keyed(b"key"))
    assert not other.received
    mesh.later_s += 2
    own.error = DRAINING
    assert json_of(await mesh.dispatcher.eval(task(), keyed(b"key"))) == f'"{other.name}:"'


async def test_a_key_is_at_most_256_characters_long(mesh: Mesh) -> None:
    await mesh.add(Evaluator("a"))
    await mesh.dispatcher.eval(task(), keyed(b"k" * 256))
    with pytest.raises(InvalidArgument, match="the header 'x-serving-key' is longer than 256 characters"):
        await mesh.dispatcher.eval(task(), keyed(b"k" * 257))
    mesh.put("/ava/serving/app/metadata/app", AppMetadata(public=False))
    with pytest.raises(Unauthenticated):
        await mesh.dispatcher.eval(task(), keyed(b"k" * 257))
