"""The library of traces, against a real receiver of OTLP."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.core import Metric

from atserving import telemetry, tracing
from atserving.errors import StartError
from atserving.local.authority import Authority
from atserving.local.ports import free_ports
from atserving.tls import ENVOY, GATE
from atserving.tracing import Event, Kind, Link, Span, Trace, Tracer
from tests.otlp_receiver import OtlpReceiver
from tests.waiting import until

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE_ID}-{PARENT}-01", f"00-{TRACE_ID}-{PARENT}-00"


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def make(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], slow_s: float | None = 1.0) -> Tracer:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    tracer = tracing.from_environment("atserving-test", {"atserving.app": "digits"}, slow_s=slow_s)
    assert tracer
    return tracer


def span(tracer: Tracer, trace: Trace, name: str = "eval") -> Span:
    now_s = time.monotonic()
    parent = int(trace.parent_id, 16) if trace.parent_id else 0
    return Span(name, trace.span_id, parent, now_s - 0.25, now_s, kind=Kind.SERVER, is_remote=bool(parent))


def counts(families: Iterator[Metric]) -> dict[str, float]:
    return {each.labels.get("outcome", "limited"): each.value for family in families for each in family.samples}


def nowhere() -> dict[str, str]:
    """Return the variables of a collector that does not listen."""
    (port,) = free_ports(1)
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_BSP_SCHEDULE_DELAY": "20"}


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_a_span_arrives_with_everything_it_has(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    headers = {"OTEL_EXPORTER_OTLP_HEADERS": "api-key=secret", "OTEL_RESOURCE_ATTRIBUTES": "deployment=test"}
    tracer = make(monkeypatch, receiver.environment(protocol, **headers))
    trace = tracer.begin(SAMPLED, "vendor=value,other=1")
    child = tracer.new_id()
    began_s, wall_ns = time.monotonic(), time.time_ns()
    whole = Span(
        "eval",
        trace.span_id,
        int(PARENT, 16),
        began_s,
        began_s + 0.5,
        {"atserving.app": "digits", "http.response.status_code": 500, "atserving.hedged": True, "atserving.ms": 1.5},
        Kind.SERVER,
        is_remote=True,
        error="the net failed",
        events=[Event("pick", began_s + 0.1, {"atserving.tried": 2})],
        links=[Link("1" * 32, 7, {"atserving.batch": True})],
    )
    tracer.export(trace, [whole, Span("attempt", child, trace.span_id, began_s, began_s + 0.25, kind=Kind.CLIENT)])
    eval_, attempt = await receiver.traced(TRACE_ID, "eval", "attempt")
    assert (eval_.kind, eval_.parent_id, eval_.span_id) == ("SERVER", PARENT, f"{trace.span_id:016x}")
    assert eval_.attributes == dict(whole.attributes)
    assert (eval_.is_error, eval_.error, eval_.trace_state) == (True, "the net failed", "vendor=value,other=1")
    assert abs(eval_.start_ns - wall_ns) < 1e9
    assert eval_.end_ns - eval_.start_ns == pytest.approx(0.5e9, abs=1e3)
    assert [(each.name, each.attributes) for each in eval_.events] == [("pick", {"atserving.tried": 2})]
    assert eval_.events[0].time_ns - eval_.start_ns == pytest.approx(0.1e9, abs=1e3)
    assert [(each.trace_id, each.span_id) for each in eval_.links] == [("1" * 32, "0" * 15 + "7")]
    assert (attempt.kind, attempt.parent_id, attempt.is_error) == ("CLIENT", eval_.span_id, False)
    assert attempt.span_id == f"{child:016x}"
    resource = eval_.resource
    assert (resource["service.name"], resource["atserving.app"], resource["deployment"]) == (
        "atserving-test",
        "digits",
        "test",
    )
    assert resource["service.version"]
    assert resource["service.instance.id"]
    assert receiver.headers[0]["api-key"] == "secret"
    await tracer.close()
    assert counts(tracer.families("x")) == {"exported": 2, "failed": 0, "dropped": 0, "limited": 0}


async def test_text_that_is_not_utf8_costs_no_other_span(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracer = make(monkeypatch, receiver.environment())
    trace = tracer.begin(SAMPLED)
    wrong = span(tracer, trace)
    wrong.attributes, wrong.error = {"atserving.app": "\ud800", "atserving.reqid": "r"}, "bad \ud800"
    tracer.export(trace, [wrong, span(tracer, trace, "other")])
    await tracer.close()
    assert [(each.name, each.error) for each in receiver.spans] == [("eval", "bad ?"), ("other", "")]
    assert receiver.spans[0].attributes["atserving.reqid"] == "r"


@pytest.mark.parametrize(
    ("sampler", "given", "seconds", "status", "skipped"),
    [
        ("parentbased_always_on", UNSAMPLED, 0.1, 404, True),
        ("parentbased_always_on", UNSAMPLED[:-1] + "2", 0.1, 200, True),
        ("parentbased_always_on", SAMPLED, 0.1, 200, False),
        ("parentbased_always_on", "", 0.1, 200, False),
        ("parentbased_always_on", UNSAMPLED + "-more", 0.1, 200, False),
        ("parentbased_always_on", UNSAMPLED, 1.0, 200, False),
        ("parentbased_always_on", UNSAMPLED, 0.1, 500, False),
        ("always_on", UNSAMPLED, 0.1, 200, False),
    ],
)
def test_only_what_is_surely_not_wanted_is_skipped(
    receiver: OtlpReceiver,
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
    given: str,
    seconds: float,
    status: int,
    skipped: bool,
) -> None:
    tracer = make(monkeypatch, receiver.environment(OTEL_TRACES_SAMPLER=sampler))
    assert tracer.skips(given.encode(), seconds, status) is skipped


async def test_the_variables_name_the_service(receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"OTEL_SERVICE_NAME": "mine", "OTEL_RESOURCE_ATTRIBUTES": "service.instance.id=one,atserving.app=other"}
    tracer = make(monkeypatch, receiver.environment(**names))
    trace = tracer.begin(SAMPLED)
    tracer.export(trace, [span(tracer, trace)])
    await tracer.close()
    (found,) = receiver.spans
    assert (found.service, found.resource["service.instance.id"]) == ("mine", "one")
    assert found.resource["atserving.app"] == "other"


@pytest.mark.parametrize(
    ("sampler", "share", "given", "is_sampled"),
    [
        ("", "", SAMPLED, True),
        ("", "", UNSAMPLED, False),
        ("", "", None, True),
        ("parentbased_always_off", "", SAMPLED, True),
        ("parentbased_always_off", "", None, False),
        ("always_on", "", UNSAMPLED, True),
        ("always_off", "", SAMPLED, False),
        ("parentbased_traceidratio", "0", SAMPLED, True),
        ("parentbased_traceidratio", "0", None, False),
        ("parentbased_traceidratio", "1", None, True),
        ("traceidratio", "0", SAMPLED, False),
        ("traceidratio", "1", UNSAMPLED, True),
        ("traceidratio", "0.79", UNSAMPLED, True),  # its first eight bytes are 0.775
        ("traceidratio", "0.77", SAMPLED, False),
    ],
)
async def test_the_sampler_decides(
    receiver: OtlpReceiver,
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
    share: str,
    given: str | None,
    is_sampled: bool,
) -> None:
    variables = {"OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": share}
    tracer = make(monkeypatch, receiver.environment(**variables))
    trace = tracer.begin(given)
    assert trace.is_sampled is is_sampled
    assert trace.traceparent().endswith("-01" if is_sampled else "-00")
    await tracer.close()


async def test_a_share_of_traces_is_sampled(receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25"}
    tracer = make(monkeypatch, receiver.environment(**variables))
    traces = [tracer.begin(None) for _ in range(4000)]
    assert 800 < sum(each.is_sampled for each in traces) < 1200
    assert len({each.trace_id for each in traces}) == len({each.span_id for each in traces}) == 4000
    await tracer.close()


MALFORMED = (
    "",
    "no trace",
    f"00-{TRACE_ID}-{PARENT}",
    f"00-{TRACE_ID.upper()}-{PARENT}-01",
    f"ff-{TRACE_ID}-{PARENT}-01",
    f"00-{'0' * 32}-{PARENT}-01",
    f"00-{TRACE_ID}-{'0' * 16}-01",
    f"00-{TRACE_ID}-{PARENT}-01-more",
    f"00-{TRACE_ID}-{PARENT}-0g",
    f"01-{TRACE_ID}-{PARENT}-01more",
)


@pytest.mark.parametrize("malformed", MALFORMED)
async def test_a_malformed_traceparent_begins_a_new_trace(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch, malformed: str
) -> None:
    tracer = make(monkeypatch, receiver.environment())
    trace = tracer.begin(malformed, "vendor=value")
    assert (trace.parent_id, trace.state) == ("", "")
    assert trace.trace_id not in (TRACE_ID, "0" * 32)
    assert tracer.begin(trace.traceparent()).trace_id == trace.trace_id
    await tracer.close()


@pytest.mark.parametrize("malformed", MALFORMED)
def test_a_malformed_traceparent_is_not_passed_on_without_traces(malformed: str) -> None:
    assert telemetry.trace_context(malformed) is None
    assert telemetry.trace_context(f"00-{TRACE_ID}-{PARENT}-01") == f"00-{TRACE_ID}-{PARENT}-01"


async def test_a_traceparent_of_a_later_version_is_taken_as_far_as_it_is_known(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracer = make(monkeypatch, receiver.environment())
    for given in (f"01-{TRACE_ID}-{PARENT}-01", f"cc-{TRACE_ID}-{PARENT}-0b-what-will-be"):
        trace = tracer.begin(given)
        assert (trace.trace_id, trace.parent_id, trace.is_sampled) == (TRACE_ID, PARENT, True)
        assert trace.traceparent(7) == f"00-{TRACE_ID}-{7:016x}-01"
    await tracer.close()


async def test_a_long_tracestate_is_dropped(receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = make(monkeypatch, receiver.environment())
    assert tracer.begin(SAMPLED, "a=" + "b" * 510).state == "a=" + "b" * 510
    assert tracer.begin(SAMPLED, "a=" + "b" * 511).state == ""
    await tracer.close()


async def test_slow_and_failed_requests_are_kept_at_a_bounded_rate(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracer = make(monkeypatch, receiver.environment(), slow_s=0.5)
    trace = tracer.begin(UNSAMPLED)
    assert not tracer.keeps(trace, 0.4, 200)
    assert not tracer.keeps(trace, 0.4, 429)
    assert tracer.keeps(trace, 0.5, 200)
    assert tracer.keeps(trace, 0.1, 503)
    tracer.export(trace, [span(tracer, trace)])
    (found,) = await receiver.traced(TRACE_ID, "eval")
    assert found.attributes == {"atserving.tail": True}
    kept = sum(tracer.keeps(trace, 0.0, 500) for _ in range(1000))
    assert kept <= 2 * tracing.TAIL_RATE
    assert counts(tracer.families("x"))["limited"] == 1000 - kept
    assert all(tracer.keeps(tracer.begin(SAMPLED), 0.0) for _ in range(1000))
    await tracer.close()


async def test_from_when_on_a_request_is_slow_changes_at_run_time(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracer = make(monkeypatch, receiver.environment(), slow_s=None)
    trace = tracer.begin(UNSAMPLED)
    before = telemetry.settings()
    try:
        for slow_s in (0.5, 2.0):
            telemetry.apply(telemetry.LogSettings(slow_s=slow_s))
            assert [tracer.keeps(trace, seconds) for seconds in (slow_s - 0.1, slow_s)] == [False, True]
    finally:
        telemetry.apply(before)
    await tracer.close()


async def test_the_end_of_a_process_exports_what_waits(receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = make(monkeypatch, {**receiver.environment(), "OTEL_BSP_SCHEDULE_DELAY": "3600000"})
    trace = tracer.begin(SAMPLED)
    tracer.export(trace, [span(tracer, trace) for _ in range(100)])
    await tracer.close()
    assert len(receiver.spans) == 100


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_a_collector_that_is_away_costs_bounded_memory_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], protocol: str
) -> None:
    variables = {
        **nowhere(),
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "OTEL_EXPORTER_OTLP_TIMEOUT": "0.1",
        "OTEL_BSP_MAX_QUEUE_SIZE": "50",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "10",
    }
    tracer = make(monkeypatch, variables)
    trace = tracer.begin(SAMPLED)
    for _ in range(100):
        tracer.export(trace, [span(tracer, trace)])
    found = counts(tracer.families("x"))
    assert found["dropped"] >= 40
    await until(lambda: counts(tracer.families("x"))["failed"] + found["dropped"] >= 100)
    await tracer.close()
    captured = capfd.readouterr()
    lines = [line for line in (captured.out + captured.err).splitlines() if "collector" in line]
    assert len(lines) == 1, lines
    assert "Failed to export" in lines[0]


async def test_the_end_of_a_process_waits_little_for_a_collector_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = make(monkeypatch, {**nowhere(), "OTEL_EXPORTER_OTLP_TIMEOUT": "3600"})
    trace = tracer.begin(SAMPLED)
    tracer.export(trace, [span(tracer, trace)])
    # The limit of the test is the promise: without its own, the end would wait for the exporter.
    async with asyncio.timeout(30):
        await tracer.close(timeout_s=0.1)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "otlp"},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
    ],
)
def test_without_the_variables_there_are_no_traces(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tracing.from_environment("atserving-test") is None


def test_without_the_variables_nothing_of_opentelemetry_is_imported() -> None:
    code = (
        "import sys; from atserving import tracing; assert tracing.from_environment('x') is None; "
        "assert not [each for each in sys.modules if each.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER is 'zipkin', should be otlp or none"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "OTEL_EXPORTER_OTLP_PROTOCOL is 'http/json', should be grpc"),
        ({"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "x"}, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL is 'x'"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4317"}, "OTEL_EXPORTER_OTLP_ENDPOINT is 'collector:4317'"),
        ({"OTEL_TRACES_SAMPLER": "sometimes"}, "OTEL_TRACES_SAMPLER is 'sometimes'"),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "2"}, "OTEL_TRACES_SAMPLER_ARG is '2'"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "many"}, "OTEL_BSP_MAX_QUEUE_SIZE is 'many'"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "5", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "6"}, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "soon"}, "OTEL_EXPORTER_OTLP_TIMEOUT is 'soon'"),
        ({"OTEL_EXPORTER_OTLP_COMPRESSION": "zip"}, "OTEL_EXPORTER_OTLP_COMPRESSION is 'zip'"),
        ({"OTEL_EXPORTER_OTLP_CERTIFICATE": "/missing.pem"}, "OTEL_EXPORTER_OTLP_CERTIFICATE is '/missing.pem'"),
        ({"OTEL_EXPORTER_OTLP_CERTIFICATE": __file__}, "OTEL_EXPORTER_OTLP_CERTIFICATE has no usable certificate"),
        ({"OTEL_EXPORTER_OTLP_CLIENT_KEY": __file__}, "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE is not"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://the collector:4317"}, "OTEL_EXPORTER_OTLP_ENDPOINT is"),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "1e300"}, "OTEL_EXPORTER_OTLP_TIMEOUT is '1e300'"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": 20 * "9"}, "OTEL_BSP_MAX_QUEUE_SIZE is"),
        ({"OTEL_BSP_SCHEDULE_DELAY": "1e300"}, "OTEL_BSP_SCHEDULE_DELAY is '1e300'"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "team=a,test"}, "OTEL_RESOURCE_ATTRIBUTES should have the form name=value"),
    ],
)
def test_a_wrong_variable_is_named_at_the_start(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StartError) as error:
        tracing.from_environment("atserving-test")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_HEADERS", "Bearer hidden"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization: Bearer hidden"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20hidden%0d%0aother"),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "authorization=hidd\u00e8n,other=hidden"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://user:hidden@collector:4318"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://user:hidden@collector:port"),
    ],
)
def test_a_wrong_variable_does_not_show_its_secret(name: str, value: str) -> None:
    code = "from atserving import errors, tracing\ntry:\n    tracing.from_environment('x', slow_s=1)\n"
    code += "except errors.StartError as error:\n    print(error)"
    environment = {"OTEL_TRACES_EXPORTER": "otlp", "PYTHONPATH": ":".join(sys.path), name: value}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"{name} should have ")
    assert "hidden" not in run.stdout + run.stderr


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_a_collector_with_tls_takes_spans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, protocol: str) -> None:
    authority, stranger = Authority(tmp_path / "authority"), Authority(tmp_path / "stranger")
    # As many images have it, for everything that asks by HTTP.
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(stranger.issue(GATE).ca))
    own = authority.issue(GATE)
    files = {"CERTIFICATE": own.ca, "CLIENT_CERTIFICATE": own.cert, "CLIENT_KEY": own.key}
    variables = {f"OTEL_EXPORTER_OTLP_{name}": str(path) for name, path in files.items()}
    with OtlpReceiver(authority.issue(ENVOY, ["127.0.0.1"])) as receiver:
        tracer = make(monkeypatch, receiver.environment(protocol, **variables))
        trace = tracer.begin(SAMPLED)
        tracer.export(trace, [span(tracer, trace)])
        await receiver.traced(TRACE_ID, "eval")
        await tracer.close()


def test_a_missing_package_is_named_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "opentelemetry.py").write_text("raise ImportError('none', name='opentelemetry')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from atserving import tracing; "
    code += "tracing.from_environment('x')"
    environment = {"OTEL_TRACES_EXPORTER": "otlp", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "opentelemetry is missing: pip install 'atserving[tracing]'" in run.stderr
