"""Envoy exports a span for each sampled request, passes the trace on, and serves without a collector."""

from __future__ import annotations

import asyncio
import secrets
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import orjson
import pytest
import pytest_asyncio

from atserving import tracing
from atserving.errors import StartError
from atserving.local import commands
from atserving.local.envoy import lay_out
from atserving.local.envoy_tracing import COMPONENT, NAMES, Export, with_tracing
from atserving.local.examples import ROOT
from atserving.local.mesh import Mesh
from atserving.otlp import SpanSink
from atserving.tracing import Tracer
from tests.envoy.rig import EVAL, Edge, eval_request
from tests.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.waiting import until

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{CALLER}-01", f"00-{TRACE}-{CALLER}-00"
BOOTSTRAP = (ROOT / "envoy" / "envoy.yaml").read_text()

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def edge(receiver: OtlpReceiver) -> AsyncIterator[Edge]:
    """An Envoy that samples what its callers sample, and nothing else."""
    environment = receiver.environment(
        OTEL_TRACES_SAMPLER="parentbased_always_off",
        OTEL_RESOURCE_ATTRIBUTES="service.instance.id=envoy-7",
        OTEL_EXPORTER_OTLP_HEADERS="x-token=%25REQ(X-REQID)%25",
    )
    async with Edge(environment=environment) as edge:
        yield edge


async def ask(edge: Edge, reqid: str, *lines: str, path: str = EVAL) -> dict[str, Any]:
    """Send a request; return the line of Envoy's log about it."""
    request = eval_request(b"x", f"x-reqid: {reqid}", *lines).replace(EVAL.encode(), path.encode(), 1)
    assert await edge.raw(request)
    found: list[dict[str, Any]] = []

    def logged() -> bool:
        lines = [orjson.loads(line) for line in edge.envoy.lines if line.startswith("{")]
        found[:] = [line for line in lines if line["reqid"] == reqid]
        return bool(found)

    await until(logged, f"{reqid} is in the log")
    return found[0]


async def span_of(receiver: OtlpReceiver, reqid: str) -> ReceivedSpan:
    """Wait for the span of a request."""

    def of_request(spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
        return [span for span in spans if span.attributes.get("atserving.reqid") == reqid]

    (span,) = of_request(await receiver.until(of_request, f"the span of {reqid} has arrived"))
    return span


async def test_a_sampled_request_has_a_span_between_its_caller_and_the_gate(edge: Edge, receiver: OtlpReceiver) -> None:
    line = await ask(edge, "sampled", f"traceparent: {SAMPLED}", "tracestate: a=1,b=2")
    span = await span_of(receiver, "sampled")
    assert (span.name, span.kind, span.service) == ("edge", "SERVER", "atserving-envoy")
    assert (span.trace_id, span.parent_id, span.trace_state) == (TRACE, CALLER, "a=1,b=2")
    assert span.resource["service.instance.id"] == "envoy-7"
    assert span.attributes["http.status_code"] == "200"
    # The log has what the gate gets.
    assert line["traceparent"] == f"00-{TRACE}-{span.span_id}-01"


async def test_a_header_for_the_collector_arrives_as_it_is(edge: Edge, receiver: OtlpReceiver) -> None:
    await ask(edge, "header", f"traceparent: {SAMPLED}")
    await span_of(receiver, "header")
    assert "%REQ(X-REQID)%" in [headers.get("x-token") for headers in receiver.headers]


async def test_a_request_that_is_not_sampled_has_no_span_but_goes_on_with_its_trace(
    edge: Edge, receiver: OtlpReceiver
) -> None:
    forced = ("x-envoy-force-trace: 1", "x-client-trace-id: me")
    unsampled = await ask(edge, "unsampled", f"traceparent: {UNSAMPLED}", *forced)
    fresh = await ask(edge, "fresh", *forced)
    assert unsampled["traceparent"].startswith(f"00-{TRACE}-")
    for line in (unsampled, fresh):
        assert line["traceparent"].endswith("-00")
    await ask(edge, "after", f"traceparent: {SAMPLED}")
    await span_of(receiver, "after")
    assert not {"unsampled", "fresh"} & {span.attributes.get("atserving.reqid") for span in receiver.spans}


async def test_a_malformed_traceparent_is_left_to_the_gate(edge: Edge) -> None:
    line = await ask(edge, "malformed", "traceparent: 00-no-trace-01")
    assert line["traceparent"] == "00-no-trace-01"


async def test_a_span_has_neither_the_path_nor_the_query(edge: Edge, receiver: OtlpReceiver) -> None:
    await ask(edge, "secret", f"traceparent: {SAMPLED}", "authorization: Bearer hidden", path=f"{EVAL}?token=hidden")
    await ask(edge, "unknown", f"traceparent: {SAMPLED}", path="/hidden")
    for reqid in ("secret", "unknown"):
        assert "hidden" not in str(await span_of(receiver, reqid))


@pytest.mark.parametrize("sampler", ["parentbased_always_on", "always_on"])
async def test_probes_are_not_traced(receiver: OtlpReceiver, sampler: str) -> None:
    async with Edge(environment=receiver.environment("http/protobuf", OTEL_TRACES_SAMPLER=sampler)) as edge:
        assert b"200 OK" in await edge.raw(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        await ask(edge, f"after-a-probe-{sampler}")
        span = await span_of(receiver, f"after-a-probe-{sampler}")
        assert span.attributes["http.method"] == "POST"
    assert not [span for span in receiver.spans if span.attributes.get("http.method") == "GET"]


async def test_spans_go_over_http_with_headers_and_by_the_sampler_alone(receiver: OtlpReceiver) -> None:
    environment = receiver.environment(
        "http/protobuf",
        OTEL_TRACES_SAMPLER="traceidratio",
        OTEL_TRACES_SAMPLER_ARG="0",
        OTEL_EXPORTER_OTLP_HEADERS="authorization=Basic%20aGk=,x-tenant=5%25 of nets",
        OTEL_SERVICE_NAME="our-edge",
    )
    async with Edge(environment=environment) as edge:
        line = await ask(edge, "refused", f"traceparent: {SAMPLED}")
        assert line["traceparent"].startswith(f"00-{TRACE}-")
        assert line["traceparent"].endswith("-00"), "the caller may not decide"
    async with Edge(environment={**environment, "OTEL_TRACES_SAMPLER_ARG": "1"}) as edge:
        await ask(edge, "by-the-sampler", f"traceparent: {UNSAMPLED}", "tracestate: a=1")
        span = await span_of(receiver, "by-the-sampler")
    assert (span.service, span.parent_id, span.trace_state) == ("our-edge", CALLER, "a=1")
    assert "refused" not in [each.attributes.get("atserving.reqid") for each in receiver.spans]
    headers = next(each for each in receiver.headers if "x-tenant" in each)
    assert (headers["authorization"], headers["x-tenant"]) == ("Basic aGk=", "5% of nets")


async def test_envoy_and_the_services_sample_the_same_share_of_traces(receiver: OtlpReceiver) -> None:
    environment = receiver.environment(OTEL_TRACES_SAMPLER="traceidratio", OTEL_TRACES_SAMPLER_ARG="0.3")
    follows, share = tracing.sampler(environment)
    tracer = Tracer(cast(SpanSink, None), 1.0, follows=follows, share=share)
    async with Edge(environment=environment) as edge:
        for number in range(40):
            given = f"00-{secrets.token_hex(16)}-{CALLER}-01"
            line = await ask(edge, f"share-{number}", f"traceparent: {given}")
            assert line["traceparent"].endswith(f"-0{tracer.begin(given).is_sampled:d}"), given


async def test_envoy_starts_and_serves_without_its_collector_and_bounds_what_one_holds() -> None:
    # It takes connections, and never answers.
    with socket.create_server(("127.0.0.1", 0)) as stuck:
        for address in ("collector.invalid:4317", f"127.0.0.1:{stuck.getsockname()[1]}"):
            environment = {
                "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{address}",
                "OTEL_BSP_SCHEDULE_DELAY": "1",
                "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "1",
            }
            async with Edge(environment=environment) as edge:
                for _ in range(40):
                    assert (await edge.ask())[0] == 200
                held = await edge.stat("cluster.traces.upstream_rq_pending_active")
                assert held + await edge.stat("cluster.traces.upstream_rq_active") <= 32


async def test_a_mesh_without_the_variables_leaves_the_trace_to_its_caller() -> None:
    async with Edge(environment={"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:1"}) as edge:
        line = await ask(edge, "off", f"traceparent: {SAMPLED}")
        assert line["traceparent"] == SAMPLED
        assert "tracing.opentelemetry" not in await edge.admin("/stats")


@pytest.mark.parametrize("name", NAMES)
async def test_envoy_takes_the_bootstraps_for_kubernetes(name: str, tmp_path: Path) -> None:
    lay_out(ROOT / "envoy", tmp_path / "envoy", None)
    text = (COMPONENT / name).read_text().replace("/etc/envoy", str(tmp_path / "envoy"))
    (tmp_path / name).write_text(text)
    command = [str(commands.BIN / "envoy"), "--mode", "validate", "-c", str(tmp_path / name)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:1"},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:1"},
    ],
)
async def test_tracing_is_off_unless_it_is_wanted(environment: dict[str, str]) -> None:
    assert Export.from_environment(environment) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:port"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "token"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "token=a%0ab"),
        ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "/etc/envoy.crt"),
        ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
        ("OTEL_TRACES_SAMPLER_ARG", "1.5"),
        ("OTEL_TRACES_SAMPLER_ARG", "nan"),
        ("OTEL_BSP_SCHEDULE_DELAY", "soon"),
    ],
)
async def test_a_wrong_variable_is_named(name: str, value: str) -> None:
    wanted = {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_TRACES_SAMPLER": "traceidratio"}
    with pytest.raises(StartError, match=name):
        Export.from_environment({**wanted, name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_HEADERS", "token"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zip"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/missing.pem"),
        ("OTEL_RESOURCE_ATTRIBUTES", "test"),
    ],
)
async def test_a_local_mesh_starts_nothing_with_a_wrong_variable(name: str, value: str) -> None:
    with pytest.raises(StartError, match=name):
        Mesh(environment={"OTEL_TRACES_EXPORTER": "otlp", name: value})


async def test_a_collector_with_tls_is_checked_by_its_name() -> None:
    export = Export.from_environment(
        {
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://collector.example:9/own/path",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_CERTIFICATE": "/etc/collector.crt",
        }
    )
    assert export
    text = with_tracing(BOOTSTRAP, export)
    for part in ("uri: https://collector.example:9/own/path", "sni: collector.example", "/etc/collector.crt"):
        assert part in text
