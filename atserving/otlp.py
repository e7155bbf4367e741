"""Exports spans by OTLP, with OpenTelemetry's own exporters; :mod:`atserving.tracing` imports it where traces are on.

The exporters read the variables ``OTEL_EXPORTER_OTLP_*``. Values that they refuse late, or ignore, are a StartError.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress

import structlog
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from atserving import __version__
from atserving import otlp_variables as variables
from atserving.errors import StartError
from atserving.tracing import Span, Trace, variable

log = structlog.get_logger()

TAIL = "atserving.tail"
"""The attribute of spans that are exported only because their request was slow or failed."""

LOG_S = 60.0
"""How often a lost collector is logged at most."""

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_SCOPE = InstrumentationScope("atserving", __version__)
_KINDS = (SpanKind.INTERNAL, SpanKind.SERVER, SpanKind.CLIENT)
_NO_ERROR = Status(StatusCode.UNSET)
_COMPRESSIONS = "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "OTEL_EXPORTER_OTLP_COMPRESSION"


def sink(service: str, attributes: Mapping[str, str]) -> SpanSink:
    """Return the sink of a process's spans, as the variables configure it. Raises StartError."""
    ours = {
        "service.name": service,
        "service.version": __version__,
        "service.instance.id": str(uuid.uuid4()),
        "host.name": socket.gethostname(),
        **attributes,
    }
    _unset_empty()
    variables.check()
    # OpenTelemetry logs what it does not like.
    reasons = _Reasons()
    # Of two with the same name, the later one counts.
    resource = Resource.create(ours).merge(OTELResourceDetector().detect())
    exporter = _Exporter(_otlp(), reasons)
    most = variables.number("OTEL_BSP_MAX_QUEUE_SIZE", 2048)
    batch = variables.number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", min(512, most))
    if batch > most:
        raise StartError(f"OTEL_BSP_MAX_EXPORT_BATCH_SIZE is {batch}, more than OTEL_BSP_MAX_QUEUE_SIZE, {most}")
    delay_ms = variables.number("OTEL_BSP_SCHEDULE_DELAY", 5000)
    return SpanSink(BatchSpanProcessor(exporter, most, delay_ms, batch, 30_000), exporter, resource, most)


class SpanSink:
    """Takes spans on the event loop; the processor's thread exports them."""

    def __init__(self, processor: BatchSpanProcessor, exporter: _Exporter, resource: Resource, most: int) -> None:
        self._processor = processor
        self._exporter = exporter
        self._resource = resource
        self._most = most
        self._added = 0
        self.dropped = 0
        """Spans that found no place, as the collector takes too few."""

    @property
    def exported(self) -> int:
        """Spans that the collector has taken."""
        return self._exporter.exported

    @property
    def failed(self) -> int:
        """Spans that it has not."""
        return self._exporter.failed

    def add(self, trace: Trace, spans: Sequence[Span]) -> None:
        """Add the spans of one request."""
        waiting = self._added - self._exporter.exported - self._exporter.failed
        if waiting + len(spans) > self._most:
            self.dropped += len(spans)
            return
        self._added += len(spans)
        trace_id = int(trace.trace_id, 16)
        state = TraceState.from_header([trace.state]) if trace.state else None
        # The clock of the system may be set meanwhile.
        epoch_ns = time.time_ns() - time.monotonic_ns()
        for span in spans:
            self._processor.on_end(self._readable(span, trace_id, state, epoch_ns, is_tail=not trace.is_sampled))

    def _readable(
        self, span: Span, trace_id: int, state: TraceState | None, epoch_ns: int, *, is_tail: bool
    ) -> ReadableSpan:
        parent = None
        if span.parent_id:
            parent = SpanContext(trace_id, span.parent_id, span.is_remote, _SAMPLED)
        return ReadableSpan(
            span.name,
            SpanContext(trace_id, span.span_id, is_remote=False, trace_flags=_SAMPLED, trace_state=state),
            parent,
            self._resource,
            {**span.attributes, TAIL: True} if is_tail else span.attributes,
            [Event(each.name, each.attributes, _ns(each.at_s, epoch_ns)) for each in span.events],
            [
                Link(SpanContext(int(each.trace_id, 16), each.span_id, False, _SAMPLED), each.attributes)
                for each in span.links
            ],
            _KINDS[span.kind],
            status=_NO_ERROR if span.error is None else Status(StatusCode.ERROR, _text(span.error)),
            start_time=_ns(span.start_s, epoch_ns),
            end_time=_ns(span.end_s, epoch_ns),
            instrumentation_scope=_SCOPE,
        )

    async def close(self, timeout_s: float) -> None:
        """Export what waits, for so long at most."""
        loop = asyncio.get_running_loop()
        closed = asyncio.Event()

        def close() -> None:
            self._processor.shutdown()  # type: ignore[no-untyped-call]
            with suppress(RuntimeError):
                # Nobody waits any longer once the loop is closed.
                loop.call_soon_threadsafe(closed.set)

        # It may last as long as the exporter's own timeouts, and the process ends without it.
        threading.Thread(target=close, name="traces-close", daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await closed.wait()


class _Exporter(SpanExporter):
    """Counts what an exporter exports, and logs in place of it."""

    def __init__(self, exporter: SpanExporter, reasons: _Reasons) -> None:
        self._exporter = exporter
        self._reasons = reasons
        # A thread of its own does not have the fields of every line.
        self._log = log.bind(**structlog.contextvars.get_contextvars())
        self._logged_s = -LOG_S
        self._is_lost = False
        self._lost = 0
        self.exported = self.failed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._exporter.export(spans)
        except Exception as error:
            self._reasons.add(str(error))
            result = SpanExportResult.FAILURE
        if result is SpanExportResult.SUCCESS:
            self.exported += len(spans)
            if self._is_lost:
                self._is_lost = False
                self._log.info("collector back")
        else:
            self.failed += len(spans)
            self._failed(len(spans))
        return result

    def _failed(self, count: int) -> None:
        self._is_lost = True
        self._lost += count
        if time.monotonic() - self._logged_s >= LOG_S:
            self._logged_s = time.monotonic()
            self._log.warning("collector lost", reason=str(self._reasons), spans=self._lost)
            self._lost = 0

    def shutdown(self) -> None:
        self._exporter.shutdown()


class _Reasons(logging.Handler):
    """Keeps what OpenTelemetry last logged, in place of its own lines.

    Its last line tells that it has given up, and the one before why.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._last: deque[str] = deque(maxlen=2)
        logger = logging.getLogger("opentelemetry")
        logger.handlers = [self]
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        self.add(record.getMessage())

    def add(self, reason: str) -> None:
        """Add a reason."""
        self._last.append(reason[:300])

    def __str__(self) -> str:
        return " ".join(self._last)


def _otlp() -> SpanExporter:
    headers = variables.headers()
    try:
        if variables.protocol() == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

            if variables.setting("COMPRESSION")[1].lower() == "none":
                # It knows no other word for it than no variable.
                for each in _COMPRESSIONS:
                    os.environ.pop(each, None)
            return GrpcExporter(headers=headers)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        if variables.setting("CERTIFICATE")[1]:
            # Its client would take these instead.
            for each in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
                os.environ.pop(each, None)
        return HttpExporter(headers=headers)
    except ImportError:
        raise
    except Exception as error:
        raise StartError(f"the exporter of traces does not take the variables OTEL_EXPORTER_OTLP_*: {error}") from None


def _unset_empty() -> None:
    """Unset empty variables: the standard takes them as unset, but not all of OpenTelemetry's code does."""
    for name in [each for each in os.environ if each.startswith("OTEL_") and not variable(each)]:
        del os.environ[name]


def _text(value: str) -> str:
    """Return a text that protobuf takes: one that it refuses would cost the other spans of its message."""
    return value.encode(errors="replace").decode()


def _ns(at_s: float, epoch_ns: int) -> int:
    return epoch_ns + round(at_s * 1e9)
