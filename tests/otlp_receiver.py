"""A receiver of traces for tests: a real server of OTLP, over gRPC and over HTTP, on loopback ports."""

from __future__ import annotations

import gzip
import ssl
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from atserving.tls import TlsFiles
from tests.waiting import until


@dataclass(frozen=True)
class ReceivedEvent:
    """A moment of a span."""

    name: str
    time_ns: int
    attributes: dict[str, Any]


@dataclass(frozen=True)
class ReceivedLink:
    """A span that another one has to do with; ids in hexadecimal digits."""

    trace_id: str
    span_id: str
    attributes: dict[str, Any]


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it arrived; ids in hexadecimal digits, times of the system's clock."""

    name: str
    kind: str
    """Such as ``SERVER``."""
    trace_id: str
    span_id: str
    parent_id: str
    """Empty without a parent."""
    trace_state: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: tuple[ReceivedEvent, ...]
    links: tuple[ReceivedLink, ...]
    is_error: bool
    error: str
    resource: dict[str, Any]

    @property
    def service(self) -> str:
        """The name of the service that sent it."""
        return str(self.resource.get("service.name", ""))


class OtlpReceiver:
    """Collects what is exported to it; a context manager."""

    def __init__(self, tls: TlsFiles | None = None) -> None:
        """``tls``: its certificate and key, and the authority of those who may call."""
        self._scheme = "https" if tls else "http"
        self._lock = threading.Lock()
        self._spans: list[ReceivedSpan] = []
        self.requests: list[ExportTraceServiceRequest] = []
        """The messages, in the order of their arrival."""
        self.headers: list[dict[str, str]] = []
        """The headers or metadata of each message; names in lower case."""
        self._grpc = grpc.server(ThreadPoolExecutor(4))
        add_TraceServiceServicer_to_server(_Servicer(self), self._grpc)  # type: ignore[no-untyped-call]
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        if tls:
            key, certificate, authority = (path.read_bytes() for path in (tls.key, tls.cert, tls.ca))
            credentials = grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)
            self._grpc_port = self._grpc.add_secure_port("127.0.0.1:0", credentials)
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(tls.ca))
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_cert_chain(tls.cert, tls.key)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        else:
            self._grpc_port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._http.daemon_threads = True
        self._serving = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def grpc_address(self) -> str:
        """``host:port`` of the gRPC server."""
        return f"127.0.0.1:{self._grpc_port}"

    @property
    def http_address(self) -> str:
        """``host:port`` of the HTTP server; the path is ``/v1/traces``."""
        return f"127.0.0.1:{self._http.server_address[1]}"

    def environment(self, protocol: str = "grpc", **others: str) -> dict[str, str]:
        """Return variables that let a process export to this receiver soon, and ``others``."""
        address = self.grpc_address if protocol == "grpc" else self.http_address
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"{self._scheme}://{address}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            **others,
        }

    def __enter__(self) -> OtlpReceiver:
        self._grpc.start()
        self._serving.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._serving.join()
        self._grpc.stop(None).wait()

    def received(self, request: ExportTraceServiceRequest, headers: dict[str, str]) -> None:
        """Take a message."""
        spans = [
            _span(span, _attributes(group.resource.attributes))
            for group in request.resource_spans
            for scope in group.scope_spans
            for span in scope.spans
        ]
        with self._lock:
            self.requests.append(request)
            self.headers.append(headers)
            self._spans += spans

    @property
    def spans(self) -> list[ReceivedSpan]:
        """All spans so far."""
        with self._lock:
            return list(self._spans)

    def trace(self, trace_id: str) -> list[ReceivedSpan]:
        """Return the spans of a trace so far, by their start."""
        found = [span for span in self.spans if span.trace_id == trace_id]
        return sorted(found, key=lambda span: span.start_ns)

    async def until(
        self, condition: Callable[[list[ReceivedSpan]], object], what: str = "the spans have arrived"
    ) -> list[ReceivedSpan]:
        """Wait until a condition holds for the spans so far; return them."""
        await until(lambda: condition(self.spans), what)
        return self.spans

    async def traced(self, trace_id: str, *names: str) -> list[ReceivedSpan]:
        """Wait until a trace has spans of these names, each as often as it is given; return its spans."""

        def has_all(_: object) -> bool:
            found = [span.name for span in self.trace(trace_id)]
            return all(found.count(name) >= names.count(name) for name in names)

        await self.until(has_all, f"the trace {trace_id} has the spans {names}")
        return self.trace(trace_id)


class _Servicer(TraceServiceServicer):
    def __init__(self, receiver: OtlpReceiver) -> None:
        self._receiver = receiver

    def Export(self, request: ExportTraceServiceRequest, context: grpc.ServicerContext) -> ExportTraceServiceResponse:
        self._receiver.received(request, {str(key): str(value) for key, value in context.invocation_metadata()})
        return ExportTraceServiceResponse()


def _handler(receiver: OtlpReceiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = self.headers["content-length"]
            body = self.rfile.read(int(length)) if length else b"".join(iter(self._chunk, b""))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            is_known = self.path == "/v1/traces"
            if is_known:
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.received(ExportTraceServiceRequest.FromString(body), headers)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200 if is_known else 404)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def _chunk(self) -> bytes:
            """Read a chunk: Envoy sends no length before."""
            chunk = self.rfile.read(int(self.rfile.readline(), 16))
            self.rfile.readline()
            return chunk

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    return Handler


def _span(span: trace_pb2.Span, resource: dict[str, Any]) -> ReceivedSpan:
    return ReceivedSpan(
        name=span.name,
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        trace_state=span.trace_state,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        events=tuple(
            ReceivedEvent(each.name, each.time_unix_nano, _attributes(each.attributes)) for each in span.events
        ),
        links=tuple(
            ReceivedLink(each.trace_id.hex(), each.span_id.hex(), _attributes(each.attributes)) for each in span.links
        ),
        is_error=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        error=span.status.message,
        resource=resource,
    )


def _attributes(pairs: Sequence[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None
