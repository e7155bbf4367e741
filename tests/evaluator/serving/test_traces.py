"""The spans of real evaluators, against a real receiver of OTLP and a real host of resources."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import pytest
from aiohttp import web
from multidict import CIMultiDictProxy

from atserving import link, transport
from atserving.v1 import evaluator_pb2, evaluator_pb2_grpc
from atserving.v1.evaluator_pb2 import InferRequest
from atserving.v1.serving_pb2 import Resource
from evaluator.serving import stages
from evaluator.serving.report import Report
from evaluator.worker.progress import Running
from tests.evaluator.calling import DIGIT, address, ask, connected
from tests.evaluator.digits import digits_tar
from tests.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.processes import Evaluator, Registry, evaluator
from tests.waiting import until, until_async

PARENT = "b7ad6b7169203331"
TRAPPED = "opentelemetry is imported"
STAGES = ("queue", "decode", "queue", "forward", "postprocess")
LOOPBACK = ("--allow-network", "127.0.0.0/8")
SCRIPT = """
import os, time
from pathlib import Path

def net_init(cfg):
    return {"batch_size": 2}

def net_inference(model, args):
    does = [(req.get("params") or {}).get("do") for req in args["reqs"]]
    if "die" in does:
        os._exit(1)
    if "fail" in does and len(does) > 1:
        raise ValueError("not together")
    if "wait" in does:
        (Path(FOLDER) / "entered").touch()
        while not (Path(FOLDER) / "go").exists():
            time.sleep(0.01)
    return [{"code": 0, "result": len(does)} for _ in does]
"""


@dataclass
class Host:
    """A host of resources that remembers what it was asked with."""

    url: str = ""
    headers: list[CIMultiDictProxy[str]] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.Response:
        self.headers.append(request.headers)
        match request.path:
            case "/to":
                raise web.HTTPFound(f"{self.url.replace('127.0.0.1', '127.0.0.2')}/7.png?token=SECRET2")
            case "/7.png":
                return web.Response(body=DIGIT.body)
        raise web.HTTPNotFound


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    host = Host()
    app = web.Application()
    app.router.add_get("/{path:.*}", host.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", 0).start()
    host.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield host
    await runner.cleanup()


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def digits(registry: Registry, receiver: OtlpReceiver) -> Iterator[Evaluator]:
    registry.publish("traced")
    with evaluator(registry, "traced", "v1", *LOOPBACK, **receiver.environment()) as process:
        yield process


@dataclass
class Pairs:
    """An evaluator of a script that waits for two requests before it runs them."""

    process: Evaluator
    folder: Path

    def let_go(self) -> None:
        """Let the script end its wait, now and later."""
        (self.folder / "go").touch()


@pytest.fixture
def pairs(registry: Registry, receiver: OtlpReceiver, tmp_path: Path) -> Iterator[Pairs]:
    script = f"FOLDER = {str(tmp_path)!r}\n{SCRIPT}".encode()
    registry.publish("pairs", file=digits_tar(tmp_path / "release.tar", **{"net.py": script}))
    registry.put("worker/app/pairs/default", {"delay4batch": "1h"})
    with evaluator(registry, "pairs", "v1", "--sandbox=off", **receiver.environment()) as process:
        yield Pairs(process, tmp_path)


def traceparent(is_sampled: bool = True) -> tuple[str, str]:
    """Return a new trace's id, and a traceparent of it."""
    trace_id = secrets.token_hex(16)
    return trace_id, f"00-{trace_id}-{PARENT}-{is_sampled:02x}"


def doing(what: str) -> InferRequest:
    return InferRequest(data=[DIGIT], params_json=orjson.dumps({"do": what}).decode())


async def in_flight(process: Evaluator, count: int) -> None:
    """Wait until the instance has so many requests."""
    async with transport.channel(address(process)) as channel:
        stub = evaluator_pb2_grpc.EvaluatorServiceStub(channel)

        async def has_all() -> bool:
            return (await stub.GetLoad(evaluator_pb2.GetLoadRequest())).in_flight == count

        await until_async(has_all, what=f"{count} requests are in flight")


def named(spans: list[ReceivedSpan], name: str) -> ReceivedSpan:
    (found,) = [each for each in spans if each.name == name]
    return found


def event_names(span: ReceivedSpan) -> list[str]:
    return [each.name for each in span.events]


async def test_the_stages_of_a_request_follow_each_other(digits: Evaluator, receiver: OtlpReceiver) -> None:
    trace_id, parent = traceparent()
    async with connected(digits) as gate:
        await ask(gate, InferRequest(data=[DIGIT]), reqid="stages", traceparent=parent)
    spans = await receiver.traced(trace_id, "infer", *STAGES)
    infer, beneath = named(spans, "infer"), [each for each in spans if each.name != "infer"]
    assert [each.name for each in sorted(beneath, key=lambda each: (each.start_ns, each.end_ns))] == list(STAGES)
    assert (infer.kind, infer.parent_id, infer.is_error) == ("SERVER", PARENT, False)
    assert infer.attributes == {
        "atserving.app": "traced",
        "atserving.version": "v1",
        "atserving.instance": digits.logged("instance", "address")["instance"],
        "atserving.reqid": "stages",
        "atserving.batch_size": 1,
        "http.response.status_code": 200,
    }
    assert infer.service == "atserving-evaluator"
    assert infer.resource["service.instance.id"] == infer.attributes["atserving.instance"]
    assert {each.parent_id for each in beneath} == {infer.span_id}
    beneath.sort(key=lambda each: (each.start_ns, each.end_ns))
    line = digits.logged(reqid="stages")
    assert line["trace_id"] == trace_id
    times = [infer.start_ns, *(each.end_ns for each in beneath)]
    assert [each.start_ns for each in beneath] == times[:-1]
    assert times[-1] <= infer.end_ns
    for name in ("decode", "forward", "postprocess"):
        span = named(beneath, name)
        assert (span.end_ns - span.start_ns) / 1e6 == pytest.approx(line[f"{name}_ms"], abs=0.002)
    assert (infer.end_ns - infer.start_ns) / 1e6 == pytest.approx(line["total_ms"], abs=0.002)


async def test_a_batch_is_linked_to_its_requests_both_ways(pairs: Pairs, receiver: OtlpReceiver) -> None:
    (one, first), (two, second), (three, third) = traceparent(), traceparent(), traceparent(is_sampled=False)
    (four, fourth) = traceparent()
    async with connected(pairs.process) as gate:
        for traceparents in ((first, second), (third, fourth)):
            await asyncio.gather(*(ask(gate, doing(""), traceparent=each) for each in traceparents))
    traces = {each: await receiver.traced(each, "infer", "forward") for each in (one, two, four)}
    infers = {each: named(traces[each], "infer") for each in traces}
    forwards = {each: named(traces[each], "forward") for each in traces}
    assert {each.attributes["atserving.batch_size"] for each in (*infers.values(), *forwards.values())} == {2}
    batches = {each: forwards[each].links[0] for each in traces}
    assert batches[one] == batches[two] != batches[four]
    for trace_id, members in ((one, (one, two)), (four, (four,))):
        (batch,) = await receiver.traced(batches[trace_id].trace_id, "batch")
        assert batch.span_id == batches[trace_id].span_id
        assert {(each.trace_id, each.span_id) for each in batch.links} == {
            (each, infers[each].span_id) for each in members
        }
        assert batch.attributes["atserving.batch_size"] == 2
        assert (batch.attributes["atserving.app"], batch.attributes["atserving.version"]) == ("pairs", "v1")
        # Each trace has its own reading of the system's clock.
        ends_ns = named(traces[trace_id], "postprocess").end_ns
        lasts_ns = ends_ns - forwards[trace_id].start_ns
        assert batch.end_ns - batch.start_ns == pytest.approx(lasts_ns, abs=1e3)
        assert batch.end_ns == pytest.approx(ends_ns, abs=1e8)
    assert not receiver.trace(three)


async def test_batches_that_wait_are_exported_at_the_end(pairs: Pairs, receiver: OtlpReceiver) -> None:
    contexts = [traceparent() for _ in range(2)]
    async with connected(pairs.process) as gate:
        await asyncio.gather(*(ask(gate, doing(""), traceparent=each) for _, each in contexts))
    pairs.process.terminate()
    assert await asyncio.to_thread(pairs.process.wait) == 0
    (batch,) = {named(receiver.trace(trace_id), "forward").links[0].trace_id for trace_id, _ in contexts}
    assert [each.name for each in receiver.trace(batch)] == ["batch"]


async def test_a_fetch_has_a_span_and_its_host_gets_the_trace(
    digits: Evaluator, receiver: OtlpReceiver, host: Host
) -> None:
    trace_id, parent = traceparent()
    there = host.url.replace("//", "//user:SECRET0@")
    async with connected(digits) as gate:
        request = InferRequest(data=[Resource(uri=f"{there}/to?token=SECRET1")], tracestate="vendor=1,other=2")
        assert (await ask(gate, request, traceparent=parent)).result_json
        missing = InferRequest(data=[Resource(uri=f"{host.url}/missing?token=SECRET3")], tracestate="odd\r\nx: y")
        failed_id, failed = traceparent()
        assert (await ask(gate, missing, traceparent=failed)).error.code == 400
    spans = await receiver.traced(trace_id, "infer", "fetch", *STAGES)
    fetch, infer = named(spans, "fetch"), named(spans, "infer")
    assert (fetch.kind, fetch.parent_id, fetch.is_error) == ("CLIENT", infer.span_id, False)
    port = int(host.url.rpartition(":")[2])
    assert fetch.attributes == {
        "http.request.method": "GET",
        "url.scheme": "http",
        "server.address": "127.0.0.2",
        "server.port": port,
        "http.request.resend_count": 1,
        "http.response.status_code": 200,
        "http.response.body.size": len(DIGIT.body),
    }
    assert [(each.name, each.attributes) for each in fetch.events] == [
        ("redirected", {"server.address": "127.0.0.2", "server.port": port})
    ]
    assert (
        infer.start_ns <= fetch.start_ns < fetch.end_ns <= min(each.start_ns for each in spans if each.name == "queue")
    )
    fetch = named(await receiver.traced(failed_id, "infer", "fetch"), "fetch")
    assert (fetch.is_error, fetch.attributes["error.type"]) == (True, "404")
    assert fetch.attributes["http.response.status_code"] == 404
    expected = f"00-{trace_id}-{named(spans, 'fetch').span_id}-01"
    assert [each["traceparent"] for each in host.headers] == [expected, expected, f"00-{failed_id}-{fetch.span_id}-01"]
    assert [each.get("tracestate") for each in host.headers] == ["vendor=1,other=2"] * 2 + [None]
    assert {each.trace_state for each in spans} == {"vendor=1,other=2"}
    everything = b"".join(each.SerializeToString() for each in receiver.requests)
    for secret in (b"SECRET0", b"SECRET1", b"SECRET2", b"SECRET3"):
        assert secret not in everything


async def test_hosts_get_no_trace_if_propagation_is_off(registry: Registry, receiver: OtlpReceiver, host: Host) -> None:
    registry.publish("quiet")
    environment = receiver.environment(OTEL_PROPAGATORS="none")
    trace_id, parent = traceparent()
    with evaluator(registry, "quiet", "v1", *LOOPBACK, **environment) as process:
        async with connected(process) as gate:
            await ask(gate, InferRequest(data=[Resource(uri=f"{host.url}/7.png")]), traceparent=parent)
        await receiver.traced(trace_id, "infer", "fetch")
    assert [each for headers in host.headers for each in headers if each.lower().startswith("trace")] == []


async def test_unsampled_requests_have_a_trace_only_if_they_failed(digits: Evaluator, receiver: OtlpReceiver) -> None:
    (good, fine), (bad, wrong), (late, slow) = (traceparent(is_sampled=False) for _ in range(3))
    async with connected(digits) as gate:
        await ask(gate, InferRequest(data=[DIGIT]), traceparent=fine, reqid="fine")
        await ask(gate, InferRequest(data=[Resource(body=b"x")]), traceparent=wrong)
        unreachable = InferRequest(data=[Resource(uri="http://127.0.0.1:1/")])
        assert (await ask(gate, unreachable, traceparent=slow)).error.code == 502
    infer = named(await receiver.traced(late, "infer", "fetch"), "infer")
    assert infer.is_error
    assert infer.attributes["atserving.tail"] is True
    assert infer.attributes["error.type"] == "502"
    # They would have come before it.
    assert not receiver.trace(good)
    assert not receiver.trace(bad)
    assert digits.logged(reqid="fine")["trace_id"] == good


async def test_slow_requests_have_a_trace_though_they_are_not_sampled(
    registry: Registry, receiver: OtlpReceiver
) -> None:
    registry.publish("slow")
    trace_id, parent = traceparent(is_sampled=False)
    with evaluator(registry, "slow", "v1", "--slow=0", **receiver.environment()) as process:
        async with connected(process) as gate:
            await ask(gate, InferRequest(data=[DIGIT]), traceparent=parent)
        spans = await receiver.traced(trace_id, "infer", *STAGES)
        assert {each.attributes["atserving.tail"] for each in spans} == {True}
        batch_id = named(spans, "forward").links[0].trace_id
        (batch,) = await receiver.traced(batch_id, "batch")
        assert batch.attributes["atserving.tail"] is True


async def test_a_crash_and_what_ran_twice_are_visible(pairs: Pairs, receiver: OtlpReceiver) -> None:
    (guilty_id, guilty), (innocent_id, innocent) = traceparent(), traceparent()
    async with connected(pairs.process) as gate:
        killing, other = (ask(gate, doing(do), traceparent=each) for do, each in (("die", guilty), ("", innocent)))
        assert (await killing).error.code == 500
        assert (await other).result_json == "1"
    spans = await receiver.traced(innocent_id, "infer", *STAGES)
    infer = named(spans, "infer")
    assert {"worker died", "suspect retried", "instance away"} <= set(event_names(infer))
    assert infer.attributes["atserving.worker_deaths"] >= 1
    assert (infer.is_error, named(spans, "forward").attributes["atserving.batch_size"]) == (False, 1)
    infer = named(await receiver.traced(guilty_id, "infer"), "infer")
    assert (infer.is_error, infer.error) == (True, "the net's process died")
    assert "worker died" in event_names(infer)


async def test_a_batch_that_failed_runs_again(pairs: Pairs, receiver: OtlpReceiver) -> None:
    contexts = [traceparent() for _ in range(2)]
    async with connected(pairs.process) as gate:
        answers = [ask(gate, doing("fail"), traceparent=each) for _, each in contexts]
        assert [(await each).result_json for each in answers] == ["1", "1"]
    forwards = [named(await receiver.traced(each, "infer", *STAGES), "forward") for each, _ in contexts]
    assert [each.attributes for each in forwards] == [{"atserving.batch_size": 1, "atserving.again": True}] * 2
    assert forwards[0].links != forwards[1].links


async def test_requests_that_end_early_show_how_far_they_came(pairs: Pairs, receiver: OtlpReceiver) -> None:
    left, waited, handed = ([traceparent() for _ in range(2)] for _ in range(3))
    async with connected(pairs.process) as gate:
        leaving = [ask(gate, doing("wait"), traceparent=each) for _, each in left]
        # These wait behind the first two.
        waiting = [ask(gate, doing("wait"), traceparent=each) for _, each in waited]
        returned = [ask(gate, doing("wait"), traceparent=each, stays=False) for _, each in handed]
        await until((pairs.folder / "entered").exists)
        await in_flight(pairs.process, 6)
        for each in leaving:
            each.cancel()
        for trace_id, _ in left:
            spans = await receiver.traced(trace_id, "infer", "queue", "forward")
            infer, forward = named(spans, "infer"), named(spans, "forward")
            assert infer.attributes["http.response.status_code"] == 499
            assert (forward.attributes, forward.end_ns) == ({"atserving.unfinished": True}, infer.end_ns)
        os.kill(pairs.process.worker(), signal.SIGKILL)
        pairs.let_go()
        assert [(await each).error.refused for each in returned] == [True, True]
        for trace_id, _ in handed:
            spans = await receiver.traced(trace_id, "infer", "queue")
            infer, queue = named(spans, "infer"), named(spans, "queue")
            assert infer.attributes["http.response.status_code"] == 503
            assert event_names(infer) == ["instance away", "handed back"]
            assert (queue.attributes, queue.end_ns) == ({"atserving.unfinished": True}, infer.end_ns)
        assert [(await each).result_json for each in waiting] == ["2", "2"]
        for trace_id, _ in waited:
            infer = named(await receiver.traced(trace_id, "infer", *STAGES), "infer")
            assert {"instance away", "instance back"} <= set(event_names(infer))


@pytest.mark.parametrize("name", ["OTEL_TRACES_EXPORTER", "OTEL_TRACES_SAMPLER"])
def test_a_wrong_variable_stops_the_start(registry: Registry, name: str) -> None:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", name: "odd"}
    process = Evaluator(registry.address, "traced", "v1", **variables)
    process.start()
    assert process.wait() == 1
    assert f"{name} is 'odd'" in process.lines[-1]


@pytest.fixture
def trap(tmp_path: Path) -> str:
    """Return a PYTHONPATH with which a process that imports OpenTelemetry writes a line."""
    folder = tmp_path / "trap" / "opentelemetry"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(f"import os; os.write(2, b'{TRAPPED}\\n')")
    path = f"{folder.parent}:{os.environ.get('PYTHONPATH', '')}"
    control = [sys.executable, "-c", "import opentelemetry"]
    trapped = subprocess.run(control, env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=True)
    assert trapped.stderr.decode() == f"{TRAPPED}\n"
    return path


async def test_without_the_variables_nothing_of_opentelemetry_is_imported(
    registry: Registry, trap: str, host: Host
) -> None:
    registry.publish("untraced")
    trace_id, parent = traceparent()
    # In a sandbox the worker would not find the trap.
    with evaluator(registry, "untraced", "v1", *LOOPBACK, "--sandbox=off", PYTHONPATH=trap) as process:
        async with connected(process) as gate:
            for each in (DIGIT, Resource(uri=f"{host.url}/7.png")):
                await ask(gate, InferRequest(data=[each]), reqid="untraced", traceparent=parent)
        assert process.logged(reqid="untraced")["trace_id"] == trace_id
        assert TRAPPED not in process.log_text()
    # What is off tells hosts nothing, and callers decide for themselves.
    assert [each for headers in host.headers for each in headers if each.lower().startswith("trace")] == []


def reply(batch_size: int = 1) -> link.Reply:
    return link.Reply(1, link.RESULT, 1_000_000, 0, 2_000_000, 3_000_000, batch_size, 1, b"")


def test_stages_are_where_the_worker_says() -> None:
    report = Report(6, struct.pack("<d?2d", 15.0, True, 1.0, 12.0))
    assert (report.prepared_s(7), report.prepared_s(8), report.again) == (1.0, 12.0, True)
    found = stages.answered(10.0, 30.0, reply(), 12.0, report)
    assert [tuple(each[:3]) for each in found] == [
        ("queue", 10.0, 12.0),
        ("decode", 12.0, 13.0),
        ("queue", 13.0, 15.0),
        ("forward", 15.0, 17.0),
        ("postprocess", 17.0, 20.0),
    ]
    assert stages.unanswered(10.0, 30.0, Running((1,), 12.0, False)) == [
        stages.Stage("queue", 10.0, 12.0),
        stages.Stage("forward", 12.0, 30.0, is_whole=False),
    ]


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), -1.0, 1e300])
def test_no_time_of_a_script_leaves_its_request(odd: float) -> None:
    found = stages.answered(10.0, 12.0, reply(), odd, Report(0, struct.pack("<d?d", odd, False, odd)))
    times = [time for each in found for time in (each.began_s, each.ended_s)]
    assert times == sorted(times)
    assert 10.0 <= times[0] <= times[-1] <= 12.0


@pytest.mark.parametrize("length", [0, 8, 10, 16, 18, 9 + (1 << 20)])
def test_a_malformed_frame_of_times_is_refused(length: int) -> None:
    with pytest.raises(link.Malformed, match="wrong length"):
        Report(0, bytes(length))


@pytest.mark.parametrize("replies", [0, 3, 5, 1 << 40])
def test_a_reply_that_no_frame_announced_has_no_time(replies: int) -> None:
    assert Report(3, struct.pack("<d?d", 1.0, False, 1.0)).prepared_s(replies) == 0.0
