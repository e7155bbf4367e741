"""One trace for each request, from Envoy over the gate to the evaluator and the hosts of its resources."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import aiohttp
import psutil
import pytest
import pytest_asyncio
from aiohttp import web

from atserving import transport
from atserving.local import commands, examples
from atserving.local.mesh import Mesh
from atserving.v1 import serving_pb2, serving_pb2_grpc
from tests.e2e.client import Client, image
from tests.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.processes import Process
from tests.waiting import PATIENCE_S

SLOW_S = 1.2
"""Longer than a request may take before it is slow."""
SLACK_NS = 1_000_000_000
STAGES = ("decode", "forward", "postprocess")
"""The stages that each request has once. It waits in two queues."""
CALLER, STATE = "b7ad6b7169203331", "vendor=value,other=1"

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Host:
    """A host of resources; it keeps the headers that it gets."""

    address: str = ""
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of the last request, by path."""
    waiting: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    """The port of the one who waits for ``/held.png``: the first one, until ``released``."""
    is_held: bool = False
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.Request) -> web.Response:
        self.headers[request.path] = {name.lower(): value for name, value in request.headers.items()}
        if request.path == "/slow.png":
            await asyncio.sleep(SLOW_S)
        if request.path == "/held.png" and not self.is_held:
            self.is_held = True
            assert request.transport
            self.waiting.put_nowait(request.transport.get_extra_info("peername")[1])
            await self.released.wait()
        return web.Response(body=image("7.png"), content_type="image/png")

    def uri(self, path: str) -> dict[str, str]:
        return {"uri": f"http://{self.address}{path}"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> AsyncIterator[Host]:
    found = Host()
    server = web.Server(found.handle)  # type: ignore[arg-type] # it is a handler of an application's requests, too
    runner = web.ServerRunner(server)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    found.address = "{}:{}".format(*runner.addresses[0])
    yield found
    await runner.cleanup()


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(receiver: OtlpReceiver, host: Host) -> AsyncIterator[Mesh]:
    extra = {"evaluator-digits-v1": ["--allow-network", host.address]}
    async with Mesh(serves=examples.DIGITS, extra=extra, environment=receiver.environment()) as mesh:
        yield mesh


@pytest_asyncio.fixture(loop_scope="module")
async def client(mesh: Mesh) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(mesh, session)


_numbers = itertools.count(1)


def caller(*, sampled: bool = True) -> tuple[str, dict[str, str]]:
    """Return the id of a new trace of a caller's, and its headers."""
    trace_id = f"{next(_numbers):032x}"
    return trace_id, {"traceparent": f"00-{trace_id}-{CALLER}-0{int(sampled)}", "tracestate": STATE}


class Tree:
    """The spans of one trace."""

    def __init__(self, spans: list[ReceivedSpan]) -> None:
        self.spans = spans
        self._by_id = {span.span_id: span for span in spans}

    def all(self, name: str) -> list[ReceivedSpan]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReceivedSpan:
        (span,) = self.all(name)
        return span

    def above(self, span: ReceivedSpan) -> list[str]:
        """Return the names of the spans above one, up to that of Envoy, or the id of one that is not there."""
        names: list[str] = []
        while span.parent_id:
            parent = self._by_id.get(span.parent_id)
            if parent is None:
                return [*names, span.parent_id]
            names.append(parent.name)
            span = parent
        return names

    def check_times(self) -> None:
        """Check that all spans are in that of Envoy. A busy machine may stop a process as it reads its clocks."""
        edge = self.one("edge")
        for span in self.spans:
            assert edge.start_ns - SLACK_NS <= span.start_ns <= span.end_ns <= edge.end_ns + SLACK_NS, span


async def trace(receiver: OtlpReceiver, trace_id: str, *names: str) -> Tree:
    """Wait until a trace has all spans of one eval, and ``names``."""
    return Tree(await receiver.traced(trace_id, *names))


async def test_an_http_request_is_one_trace_from_envoy_to_the_stages(client: Client, receiver: OtlpReceiver) -> None:
    trace_id, headers = caller()
    response = await client.bytes("/v1/eval/digits", image("7.png"), **headers, **{"x-reqid": "traced-1"})
    assert response.best == "seven"
    tree = await trace(receiver, trace_id, "edge", "eval", "attempt", "infer", *STAGES)
    for stage in STAGES:
        assert tree.above(tree.one(stage)) == ["infer", "attempt", "eval", "edge", CALLER]
    tree.check_times()
    services = [tree.one(name).service for name in ("edge", "eval", "infer")]
    assert services == ["atserving-envoy", "atserving-gate", "atserving-evaluator"]
    for name in ("edge", "eval", "infer"):
        span = tree.one(name)
        assert (span.kind, span.attributes["atserving.reqid"]) == ("SERVER", "traced-1")
        assert not span.is_error
    assert (tree.one("eval").attributes["atserving.app"], tree.one("infer").attributes["atserving.version"]) == (
        "digits",
        "v1",
    )
    assert tree.one("edge").trace_state == tree.one("eval").trace_state == STATE
    # The batch is a trace of its own, as it belongs to all of its requests.
    (link,) = tree.one("forward").links
    batch = Tree(await receiver.traced(link.trace_id, "batch")).one("batch")
    assert batch.span_id == link.span_id
    assert (trace_id, tree.one("infer").span_id) in [(each.trace_id, each.span_id) for each in batch.links]


async def test_a_request_without_a_trace_begins_one_in_envoy(client: Client, receiver: OtlpReceiver) -> None:
    await client.bytes("/v1/eval/digits", image("7.png"), **{"x-reqid": "untraced"})

    def edges(spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
        return [span for span in spans if span.name == "edge" and span.attributes["atserving.reqid"] == "untraced"]

    (edge,) = edges(await receiver.until(edges))
    tree = await trace(receiver, edge.trace_id, "edge", "infer", "eval")
    assert tree.one("edge").parent_id == ""
    assert tree.above(tree.one("eval")) == ["edge"]


async def test_a_grpc_request_is_one_trace(mesh: Mesh, receiver: OtlpReceiver) -> None:
    trace_id, headers = caller()
    request = serving_pb2.EvalRequest(app="digits", data=[serving_pb2.Resource(body=image("7.png"))])
    async with transport.channel(f"127.0.0.1:{mesh.ports.edge}") as channel:
        stub = serving_pb2_grpc.ServingServiceStub(channel)
        response = await stub.Eval(request, metadata=tuple(headers.items()))
    assert response.code == 0
    tree = await trace(receiver, trace_id, "edge", "eval", "attempt", "infer", *STAGES)
    assert tree.above(tree.one("forward")) == ["infer", "attempt", "eval", "edge", CALLER]
    tree.check_times()


async def test_a_batch_is_one_trace_with_an_eval_for_each_task(client: Client, receiver: OtlpReceiver) -> None:
    trace_id, headers = caller()
    tasks = [{"op": "/v1/eval/digits", "data": client.uri(name)} for name in ("7.png", "3.png")]
    assert (await client.json("/v1/batch", tasks, **headers)).status == 200
    tree = await trace(receiver, trace_id, "edge", "batch", *("eval", "attempt", "infer", "fetch", *STAGES) * 2)
    for fetch in tree.all("fetch"):
        assert tree.above(fetch) == ["infer", "attempt", "eval", "batch", "edge", CALLER]
    assert len({span.parent_id for span in tree.all("attempt")}) == 2
    tree.check_times()


async def test_hosts_of_resources_are_part_of_the_trace(client: Client, receiver: OtlpReceiver, host: Host) -> None:
    trace_id, headers = caller()
    assert (await client.json("/v1/eval/digits/v1", {"data": host.uri("/7.png?key=hidden")}, **headers)).status == 200
    tree = await trace(receiver, trace_id, "fetch", "infer", "eval", "edge")
    asked = host.headers["/7.png"]
    assert asked["traceparent"] == f"00-{trace_id}-{tree.one('fetch').span_id}-01"
    assert asked["tracestate"] == STATE
    assert "hidden" not in str(tree.spans)


async def test_a_request_that_nobody_samples_leaves_only_its_tail(
    client: Client, receiver: OtlpReceiver, host: Host
) -> None:
    (quiet, unsampled), (slow, too_slow), (failed, broken) = (caller(sampled=False) for _ in range(3))
    assert (await client.bytes("/v1/eval/digits", image("7.png"), **unsampled)).status == 200
    assert (await client.json("/v1/eval/digits/v1", {"data": host.uri("/slow.png")}, **too_slow)).status == 200
    await client.mesh.stop_process("evaluator-digits-v2")
    assert (await client.bytes("/v1/eval/digits/v2", image("7.png"), **broken)).status == 503
    for trace_id, names in ((slow, ("eval", "attempt", "infer", "fetch", *STAGES)), (failed, ("eval",))):
        tree = await trace(receiver, trace_id, *names)
        assert all(span.attributes["atserving.tail"] for span in tree.spans)
        # The span of Envoy is not there.
        assert tree.all("edge") == []
        assert len(tree.one("eval").parent_id) == 16
    assert tree.one("eval").is_error
    # All that came before has arrived, too, once a later request has.
    last, headers = caller()
    await client.bytes("/v1/eval/digits", image("7.png"), **headers)
    await trace(receiver, last, "edge", "eval", "infer")
    assert receiver.trace(quiet) == []


async def test_a_request_whose_instance_is_killed_shows_both_attempts(
    mesh: Mesh, client: Client, receiver: OtlpReceiver, host: Host
) -> None:
    command = commands.evaluator(mesh.registry, "digits", "v1", "--allow-network", host.address)
    other = Process(command, environment=receiver.environment())
    other.start()
    try:
        other.logged("address", app="digits")
        trace_id, headers = caller()
        asking = asyncio.create_task(
            client.json("/v1/eval/digits/v1", {"data": host.uri("/held.png")}, **headers), name="ask"
        )
        async with asyncio.timeout(PATIENCE_S):
            port = await host.waiting.get()
        if port in _ports(other.pid):
            other.kill()
        else:
            mesh.kill_process("evaluator-digits-v1")
        response = await asking
        assert response.best == "seven"
        tree = await trace(receiver, trace_id, "edge", "eval", "attempt", "attempt", "infer")
        first, *_, last = attempts = tree.all("attempt")
        assert {each.parent_id for each in attempts} == {tree.one("eval").span_id}
        assert (first.is_error, last.is_error) == (True, False)
        assert first.attributes["atserving.instance"] != last.attributes["atserving.instance"]
        assert tree.one("infer").parent_id == last.span_id
        assert host.headers["/held.png"]["traceparent"] == f"00-{trace_id}-{tree.one('fetch').span_id}-01"
    finally:
        host.released.set()
        other.kill()


def _ports(pid: int) -> set[int]:
    """Return the local ports of a process's connections."""
    return {each.laddr.port for each in psutil.Process(pid).net_connections("tcp") if each.laddr}
