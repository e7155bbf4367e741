"""A gate's spans of requests, against a real receiver of OTLP; its server is real, and tests script the instances."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import orjson
import pytest
from google.api import httpbody_pb2

from atserving import link, tracing
from atserving.config import AppMetadata
from atserving.counting import MAX_REQUEST_BYTES
from atserving.grpc_server import Server
from atserving.transport import channel
from atserving.v1 import evaluator_pb2, serving_pb2
from evaluator.serving.link_server import Replier
from gate import record, turns
from gate.callers import Callers
from gate.server import EdgeService, ServingService
from tests.gate.test_away import AWAY, impatient
from tests.gate.test_dispatch import DRAINING, FULL, Evaluator, Mesh, running_mesh
from tests.gate.test_shadow import cast
from tests.instance import ScriptedInstance, ScriptedRequest
from tests.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.processes import Gate, running_registry
from tests.waiting import until

__all__ = ["impatient"]  # a fixture

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE_ID}-{PARENT}-01", f"00-{TRACE_ID}-{PARENT}-00"
BAD_IMAGE = evaluator_pb2.Error(code=-3, status=400, message="bad image")
BROKEN = evaluator_pb2.Error(code=500, status=500, message="the net failed")


class Instance(ScriptedInstance):
    """Keeps the calls, too, and has the stages of a net in its replies."""

    def __init__(self, *arguments: Any, **fields: Any) -> None:
        super().__init__(*arguments, **fields)
        self.calls: list[link.Call] = []

    def begin(self, call: link.Call, replier: Replier, held: int | None = None) -> ScriptedRequest:
        self.calls.append(call)
        return super().begin(call, _Staged(replier), held)

    @property
    def traceparents(self) -> list[str]:
        return [call.traceparent.decode() for call in self.calls]

    @property
    def states(self) -> list[str]:
        requests = [evaluator_pb2.InferRequest.FromString(bytes(call.request)) for call in self.calls]
        return [request.tracestate for request in requests]


class _Staged:
    def __init__(self, replier: Replier) -> None:
        self._replier = replier
        self.hold = replier.hold

    def reply(self, reply: link.Reply, held: int = 0) -> None:
        staged = reply._replace(decode_us=2000, queue_us=3000, forward_us=4000, postprocess_us=1000, batch_size=1)
        self._replier.reply(staged, held)


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


class Traced:
    """A gate that traces, its scripted instances, and a client of its server."""

    def __init__(self, mesh: Mesh, channel: grpc.aio.Channel) -> None:
        self.mesh = mesh
        self.channel = channel

    async def add(self, evaluator: Evaluator, version: str = "v1", *, built_in: bool = False) -> Instance:
        server = Instance(evaluator.infer, "app", version, evaluator.name, built_in=built_in)
        instance = await server.start()
        self.mesh._stack.push_async_callback(server.stop)
        self.mesh.put(instance.key, instance)
        self.mesh.instance_keys.add(instance.key)
        return server

    async def eval(
        self, traceparent: str | None = SAMPLED, *, app: str = "app", **headers: str
    ) -> serving_pb2.EvalResponse | grpc.aio.AioRpcError:
        """Call the typed interface."""
        request = serving_pb2.EvalRequest(app=app, data=[serving_pb2.Resource(body=b"image")])
        call = self.channel.unary_unary("/atserving.v1.ServingService/Eval", None, serving_pb2.EvalResponse.FromString)(
            request.SerializeToString(), metadata=_metadata(traceparent, headers)
        )
        try:
            answer: serving_pb2.EvalResponse = await call
        except grpc.aio.AioRpcError as error:
            return error
        return answer

    async def batch(self, count: int, traceparent: str | None = SAMPLED, **headers: str) -> bytes:
        """Call the interface of the edge with a batch."""
        tasks = [{"op": "/v1/eval/app", "data": {"uri": "data:;base64,AA=="}} for _ in range(count)]
        body = httpbody_pb2.HttpBody(content_type="application/json", data=orjson.dumps(tasks))
        call = self.channel.unary_unary("/atserving.v1.EdgeService/Batch", None, None)
        try:
            return bytes(await call(body.SerializeToString(), metadata=_metadata(traceparent, headers)))
        except grpc.aio.AioRpcError:
            # A plain HTTP response is no gRPC.
            return b""


def _metadata(traceparent: str | None, headers: dict[str, str]) -> list[tuple[str, str]]:
    trace = [("traceparent", traceparent)] if traceparent else []
    return [*trace, *((name.replace("_", "-"), value) for name, value in headers.items())]


@pytest.fixture
async def traced(receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Traced]:
    for name, value in receiver.environment().items():
        monkeypatch.setenv(name, value)
    tracer = tracing.from_environment("atserving-gate")
    async with running_mesh() as mesh:
        mesh.dispatcher.tracer = tracer
        server = Server([], MAX_REQUEST_BYTES, mesh.held)
        for service in (ServingService, EdgeService):
            service(mesh.dispatcher, 50, mesh.held, Callers()).register(server)
        port = await server.start("127.0.0.1:0")
        async with channel(f"127.0.0.1:{port}") as client:
            yield Traced(mesh, client)
        await server.stop(0)
    assert tracer
    await tracer.close()


def named(spans: list[ReceivedSpan], name: str) -> list[ReceivedSpan]:
    return [span for span in spans if span.name == name]


async def test_a_sampled_request_has_a_span_and_one_for_its_attempt(traced: Traced, receiver: OtlpReceiver) -> None:
    instance = await traced.add(Evaluator("a"))
    await traced.eval(x_reqid="request-1")
    whole, attempt = await receiver.traced(TRACE_ID, "eval", "attempt")
    assert (whole.kind, whole.parent_id, whole.service, whole.is_error) == ("SERVER", PARENT, "atserving-gate", False)
    assert whole.attributes == {
        "atserving.app": "app",
        "atserving.version": "v1",
        "atserving.reqid": "request-1",
        "http.response.status_code": 200,
    }
    assert (attempt.kind, attempt.parent_id, attempt.is_error) == ("CLIENT", whole.span_id, False)
    assert attempt.attributes.pop("server.address").startswith("127.0.0.1:")
    assert attempt.attributes == {"atserving.instance": "a", "atserving.version": "v1", "atserving.outcome": "ok"}
    assert whole.start_ns <= attempt.start_ns <= attempt.end_ns <= whole.end_ns
    assert instance.traceparents == [f"00-{TRACE_ID}-{attempt.span_id}-01"]


async def test_a_request_without_a_trace_begins_one(traced: Traced, receiver: OtlpReceiver) -> None:
    instance = await traced.add(Evaluator("a"))
    await traced.eval("00-malformed-01", tracestate="vendor=value")
    spans = await receiver.until(lambda spans: len(spans) == 2)
    (whole,), (attempt,) = named(spans, "eval"), named(spans, "attempt")
    assert (whole.parent_id, whole.trace_state) == ("", "")
    assert instance.traceparents == [f"00-{whole.trace_id}-{attempt.span_id}-01"]
    assert instance.states == [""], "a state without its trace is dropped"


async def test_the_state_of_a_trace_reaches_the_instance(traced: Traced, receiver: OtlpReceiver) -> None:
    instance = await traced.add(Evaluator("a"))
    await traced.eval(tracestate="one=1,two=2")
    await traced.eval(UNSAMPLED, tracestate="three=3")
    await traced.eval(tracestate="a=" + "b" * 511)
    await traced.batch(1, tracestate="one=1,two=2")
    assert instance.states == ["one=1,two=2", "three=3", "", "one=1,two=2"]
    await receiver.traced(TRACE_ID, "eval", "eval", "eval")
    assert receiver.trace(TRACE_ID)[0].trace_state == "one=1,two=2"


async def test_several_headers_of_a_state_become_one(traced: Traced) -> None:
    instance = await traced.add(Evaluator("a"))
    request = serving_pb2.EvalRequest(app="app", data=[serving_pb2.Resource(body=b"image")])
    metadata = (("traceparent", SAMPLED), ("tracestate", "one=1"), ("tracestate", "two=2"))
    call = traced.channel.unary_unary("/atserving.v1.ServingService/Eval", None, None)
    await call(request.SerializeToString(), metadata=metadata)
    assert instance.states == ["one=1,two=2"]


async def test_without_tracing_the_headers_pass_through_unchanged(traced: Traced, receiver: OtlpReceiver) -> None:
    traced.mesh.dispatcher.tracer = None
    instance = await traced.add(Evaluator("a"))
    await traced.eval(UNSAMPLED, tracestate="one=1")
    await traced.eval(None, tracestate="one=1")
    await traced.eval("malformed", tracestate="one=1")
    await traced.batch(1, tracestate="one=1")
    assert instance.traceparents == [UNSAMPLED, "", "", SAMPLED]
    assert instance.states == ["one=1", "", "", "one=1"]
    assert not receiver.spans


async def test_only_slow_and_failed_ones_of_the_others_are_exported(traced: Traced, receiver: OtlpReceiver) -> None:
    evaluator = Evaluator("a")
    instance = await traced.add(evaluator)
    await traced.eval(UNSAMPLED, x_reqid="quick")
    evaluator.error = BAD_IMAGE
    await traced.eval(UNSAMPLED, x_reqid="refused")
    evaluator.error = BROKEN
    await traced.eval(UNSAMPLED, x_reqid="failed")
    evaluator.error = None
    assert traced.mesh.dispatcher.tracer
    traced.mesh.dispatcher.tracer._slow_s = 0.0
    await traced.eval(UNSAMPLED, x_reqid="slow")
    spans = await receiver.traced(TRACE_ID, "eval", "eval", "attempt", "attempt")
    assert [each.attributes["atserving.reqid"] for each in named(spans, "eval")] == ["failed", "slow"]
    assert all(each.attributes["atserving.tail"] is True for each in spans)
    failed = named(spans, "eval")[0]
    assert (failed.is_error, failed.error, failed.attributes["error.type"]) == (True, "the net failed", "500")
    # The instance finds its own spans beneath the one of the request.
    assert {each.span_id for each in named(spans, "eval")} <= {each[36:52] for each in instance.traceparents}
    assert all(each.endswith("-00") for each in instance.traceparents)
    assert {each.parent_id for each in named(spans, "attempt")} == {each.span_id for each in named(spans, "eval")}


async def test_a_refused_request_has_a_span_with_the_reason(traced: Traced, receiver: OtlpReceiver) -> None:
    traced.mesh.put("/ava/serving/app/metadata/app", AppMetadata(public=False))
    await traced.eval()
    await traced.eval(app="unknown")
    await traced.eval(app="")
    spans = await receiver.traced(TRACE_ID, "eval", "eval", "eval")
    assert [each.attributes["http.response.status_code"] for each in spans] == [401, 404, 400]
    assert [each.attributes["atserving.refusal"] for each in spans] == ["unauthenticated", "unknown", "malformed"]
    assert not any(each.is_error for each in spans)
    assert all(each.attributes["atserving.reason"] for each in spans)


@pytest.mark.parametrize(("error", "outcome"), [(FULL, "full"), (DRAINING, "refused"), (AWAY, "away")])
async def test_a_retry_is_a_span_of_its_own(
    traced: Traced, receiver: OtlpReceiver, error: evaluator_pb2.Error, outcome: str
) -> None:
    # Both take turns at being the first, until the one that refuses was.
    refusing, other = await traced.add(Evaluator("a", error)), await traced.add(Evaluator("b"))
    while not refusing.calls:
        await traced.eval()
    spans = await receiver.until(lambda spans: any(each.attributes.get("atserving.cause") for each in spans))
    (second,) = [each for each in spans if each.attributes.get("atserving.cause")]
    (first,) = [each for each in spans if each.attributes.get("atserving.instance") == "a"]
    assert (first.attributes["atserving.outcome"], first.is_error) == (outcome, True)
    assert second.attributes["atserving.cause"] == outcome
    assert (second.attributes["atserving.tried"], second.attributes["atserving.outcome"]) == (1, "ok")
    assert first.parent_id == second.parent_id
    assert first.end_ns <= second.start_ns
    assert f"00-{TRACE_ID}-{first.span_id}-01" in refusing.traceparents
    assert f"00-{TRACE_ID}-{second.span_id}-01" in other.traceparents


async def test_a_lost_instance_is_seen(traced: Traced, receiver: OtlpReceiver) -> None:
    lost = Evaluator("a", hold=asyncio.Event())
    server = await traced.add(lost)
    asking = asyncio.create_task(traced.eval())
    await lost.entered.wait()
    await traced.add(Evaluator("b"))
    await server.stop()
    await asking
    _, first, second = await receiver.traced(TRACE_ID, "eval", "attempt", "attempt")
    assert (first.attributes["atserving.outcome"], first.attributes["error.type"]) == ("lost", "lost")
    assert (second.attributes["atserving.cause"], second.attributes["atserving.outcome"]) == ("lost", "ok")


@pytest.mark.usefixtures("impatient")
async def test_a_hedge_is_a_span_beside_the_slow_one(traced: Traced, receiver: OtlpReceiver) -> None:
    slow = Evaluator("slow", hold=asyncio.Event())
    await traced.add(slow, built_in=True)
    await traced.eval(None, app="unknown")
    asking = asyncio.create_task(traced.eval())
    await slow.entered.wait()
    await traced.add(Evaluator("free"), built_in=True)
    await asking
    _, first, second = await receiver.traced(TRACE_ID, "eval", "attempt", "attempt")
    assert first.attributes["atserving.outcome"] == "abandoned"
    assert (second.attributes["atserving.cause"], second.attributes["atserving.outcome"]) == ("hedge", "ok")
    assert not first.is_error


async def test_the_deadline_is_seen(traced: Traced, receiver: OtlpReceiver) -> None:
    hung = Evaluator("a", hold=asyncio.Event())
    await traced.add(hung)
    await traced.eval(UNSAMPLED, grpc_timeout="200m")
    whole, attempt = await receiver.traced(TRACE_ID, "eval", "attempt")
    assert whole.attributes["http.response.status_code"] == 504
    assert attempt.attributes["atserving.outcome"] == "timeout"


async def test_a_caller_who_leaves_ends_the_spans(traced: Traced, receiver: OtlpReceiver) -> None:
    hung = Evaluator("a", hold=asyncio.Event())
    await traced.add(hung)
    asking = asyncio.create_task(traced.eval())
    await hung.entered.wait()
    asking.cancel()
    whole, attempt = await receiver.traced(TRACE_ID, "eval", "attempt")
    assert whole.attributes["http.response.status_code"] == 499
    assert attempt.attributes["atserving.outcome"] == "abandoned"
    assert attempt.end_ns <= whole.end_ns


async def test_the_wait_for_a_turn_is_seen(
    traced: Traced, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "AT_ONCE", 0)
    await traced.add(Evaluator("a"))
    await traced.eval()
    whole, waited, attempt = await receiver.traced(TRACE_ID, "eval", "wait for turn", "attempt")
    assert (waited.kind, waited.parent_id, waited.start_ns) == ("INTERNAL", whole.span_id, whole.start_ns)
    assert waited.end_ns <= attempt.start_ns


async def test_the_tasks_of_a_batch_are_beneath_its_span(traced: Traced, receiver: OtlpReceiver) -> None:
    instance = await traced.add(Evaluator("a"))
    await traced.batch(3)
    spans = await receiver.traced(TRACE_ID, "batch", *3 * ["eval"], *3 * ["attempt"])
    (batch,) = named(spans, "batch")
    assert (batch.kind, batch.parent_id) == ("SERVER", PARENT)
    tasks = named(spans, "eval")
    assert {(each.kind, each.parent_id) for each in tasks} == {("INTERNAL", batch.span_id)}
    attempts = named(spans, "attempt")
    assert sorted(each.parent_id for each in attempts) == sorted(each.span_id for each in tasks)
    assert sorted(instance.traceparents) == sorted(f"00-{TRACE_ID}-{each.span_id}-01" for each in attempts)
    assert all(batch.start_ns <= each.end_ns <= batch.end_ns for each in spans)


async def test_a_caller_who_leaves_ends_the_span_of_a_batch(traced: Traced, receiver: OtlpReceiver) -> None:
    hung = Evaluator("a", hold=asyncio.Event())
    await traced.add(hung)
    asking = asyncio.create_task(traced.batch(2))
    await hung.entered.wait()
    asking.cancel()
    spans = await receiver.traced(TRACE_ID, "batch", "eval", "eval")
    assert {each.attributes["http.response.status_code"] for each in spans if each.name != "attempt"} == {499}


async def test_a_malformed_batch_has_one_span(traced: Traced, receiver: OtlpReceiver) -> None:
    await traced.batch(0)
    (batch,) = await receiver.traced(TRACE_ID, "batch")
    assert batch.attributes["http.response.status_code"] == 400


async def test_a_task_that_finds_no_place_keeps_a_bounded_record(
    traced: Traced, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "MOST_ATTEMPTS", 4)
    evaluator = Evaluator("a", FULL)
    instance = await traced.add(evaluator)

    def relent() -> None:
        if len(evaluator.received) > 8:
            evaluator.error = None

    evaluator.on_request = relent
    await traced.batch(1)
    spans = await receiver.traced(TRACE_ID, "batch", "eval", *4 * ["attempt"])
    assert len(named(spans, "attempt")) == 4 < len(instance.calls)
    assert named(spans, "attempt")[-1].attributes["atserving.outcome"] == "ok"


async def test_a_copy_for_a_shadow_is_no_part_of_the_trace(traced: Traced, receiver: OtlpReceiver) -> None:
    await traced.add(Evaluator("a"))
    shadow = await traced.add(Evaluator("b"), "v2")
    cast(traced.mesh)
    await traced.eval()
    await until(lambda: shadow.calls)
    assert [(each[3:35], each[-2:]) for each in shadow.traceparents] == [(TRACE_ID, "00")]
    assert len(await receiver.traced(TRACE_ID, "eval", "attempt")) == 2


async def test_the_log_line_names_the_trace_and_its_span(
    traced: Traced, receiver: OtlpReceiver, capfd: pytest.CaptureFixture[str]
) -> None:
    await traced.add(Evaluator("a"))
    await traced.eval(x_reqid="traced")
    whole, _ = await receiver.traced(TRACE_ID, "eval", "attempt")
    (line,) = [orjson.loads(line) for line in capfd.readouterr().err.splitlines() if '"traced"' in line]
    assert (line["trace_id"], line["traceparent"]) == (TRACE_ID, f"00-{TRACE_ID}-{whole.span_id}-01")


async def test_spans_count_in_the_metrics_of_a_gate(traced: Traced, receiver: OtlpReceiver) -> None:
    await traced.add(Evaluator("a"))
    await traced.eval()
    await receiver.traced(TRACE_ID, "eval", "attempt")
    tracer = traced.mesh.dispatcher.tracer
    assert tracer
    await tracer.close()
    page = "".join(
        f"{sample.name}{sample.labels}={sample.value}\n"
        for family in tracer.families("atserving_gate")
        for sample in family.samples
    )
    assert "atserving_gate_spans_total{'outcome': 'exported'}=2" in page
    assert "atserving_gate_traces_limited_total{}=0" in page


def test_a_gate_without_the_variables_imports_nothing_of_opentelemetry(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "gate", "--listen", "127.0.0.1:0", "--wait", "0.01"]
    flags = ["--registry", "127.0.0.1:1"]
    run = subprocess.run([*command, *flags], capture_output=True, text=True, check=False, timeout=60)
    assert "no config within" in run.stderr
    assert "gate.record" in run.stderr
    assert "opentelemetry" not in run.stderr


def test_a_gate_with_a_wrong_variable_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "jaeger")
    command = [sys.executable, "-m", "gate", "--listen", "127.0.0.1:0"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (run.returncode, run.stderr) == (1, "gate: OTEL_TRACES_EXPORTER is 'jaeger', should be otlp or none\n")


@pytest.mark.slow
async def test_a_gate_that_stops_exports_what_waits(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    variables = {"OTEL_BSP_SCHEDULE_DELAY": "3600000", "OTEL_TRACES_SAMPLER": "always_off"}
    for name, value in receiver.environment(**variables).items():
        monkeypatch.setenv(name, value)
    with running_registry(tmp_path) as registry:
        gate = Gate([registry.address], "--slow", "0")
        gate.start()
        try:
            assert await gate.status("unknown") is grpc.StatusCode.NOT_FOUND
            assert not [span for span in receiver.spans if span.service == "atserving-gate"]
            gate.terminate()
            assert await asyncio.to_thread(gate.wait) == 0
        finally:
            gate.kill()
    (span,) = [span for span in receiver.spans if span.service == "atserving-gate"]
    assert (span.attributes["http.response.status_code"], span.attributes["atserving.tail"]) == (404, True)


async def timing(traced: Traced, **headers: str) -> dict[str, float]:
    """Return the ``server-timing`` of an eval."""
    request = serving_pb2.EvalRequest(app="app", data=[serving_pb2.Resource(body=b"image")])
    call = traced.channel.unary_unary("/atserving.v1.ServingService/Eval", None, None)(
        request.SerializeToString(), metadata=_metadata(None, {"x-serving-timing": "1", **headers})
    )
    try:
        await call
        found = list(await call.initial_metadata())
    except grpc.aio.AioRpcError as error:
        found = list(error.trailing_metadata() or ())
    (value,) = [str(value) for name, value in found if name == "server-timing"]
    entries = value.split(", ")
    return {name: float(value) for name, _, value in (entry.partition(";dur=") for entry in entries)}


@pytest.mark.parametrize("traces", [True, False])
async def test_timing_has_the_stages_of_the_answer(traced: Traced, traces: bool) -> None:
    if not traces:
        traced.mesh.dispatcher.tracer = None
    await traced.add(Evaluator("a"))
    found = await timing(traced)
    # The instance's times may be more than the whole has taken: nothing is below 0.
    assert found.pop("total") >= 0
    assert found.pop("gate") >= 0
    assert found == {"decode": 2, "queue": 3, "forward": 4, "post": 1}


async def test_timing_has_the_retries(traced: Traced) -> None:
    hold = asyncio.Event()
    refusing = Evaluator("a", DRAINING, hold=hold)
    await traced.add(refusing)
    asking = asyncio.create_task(timing(traced))
    await refusing.entered.wait()
    await traced.add(Evaluator("b"))
    began_s = asyncio.get_running_loop().time()
    await until(lambda: asyncio.get_running_loop().time() - began_s > 0.05)
    hold.set()
    found = await asking
    assert list(found) == ["gate", "retry", "decode", "queue", "forward", "post", "total"]
    assert found["retry"] >= 50


async def test_timing_of_a_deadline_says_how_long_an_instance_had_the_request(traced: Traced) -> None:
    await traced.add(Evaluator("a", hold=asyncio.Event()))
    found = await timing(traced, grpc_timeout="200m")
    assert list(found) == ["gate", "instance", "total"]
    assert found["instance"] >= 100
