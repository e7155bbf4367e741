"""Traces of requests, by W3C Trace Context and OpenTelemetry; off unless the variables ``OTEL_*`` ask for them.

On the path of a request there are only ids and times of the monotonic clock (:class:`Trace`). Its spans are made when
it has ended, and only if its trace is sampled, or if it was slow or failed: the tail. :mod:`atserving.otlp` exports
them from a thread of its own, and is imported only where traces are on.

Source: https://www.w3.org/TR/trace-context/
"""

from __future__ import annotations

import itertools
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, Metric

from atserving import telemetry
from atserving.errors import StartError

if TYPE_CHECKING:
    from atserving.otlp import SpanSink

TAIL_RATE = 20.0
"""How many traces a second a process exports because they are slow or failed, though they are not sampled."""

FLUSH_S = 3.0
"""How long the end of a process waits for the spans that are left."""

MAX_STATE_CHARS = 512
"""A longer ``tracestate`` is dropped."""

_IDS = r"[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"
# Versions to come may have more after these fields.
_TRACEPARENT = re.compile(rf"00-{_IDS}|(?!00|ff)[0-9a-f]{{2}}-{_IDS}(?:-.*)?", re.ASCII | re.DOTALL)
_NO_TRACE, _NO_SPAN = 32 * "0", 16 * "0"
_SAMPLED = frozenset("13579bdf")
_UNSAMPLED = frozenset(b"02468ace")

# What a share of traces is counted in.
_PARTS = 1_000_000

# The name of each sampler: whether it takes over the decision of a parent, and the share of the other traces.
_SAMPLERS: dict[str, tuple[bool, float | None]] = {
    "always_on": (False, 1.0),
    "always_off": (False, 0.0),
    "traceidratio": (False, None),
    "parentbased_always_on": (True, 1.0),
    "parentbased_always_off": (True, 0.0),
    "parentbased_traceidratio": (True, None),
}

Attribute = str | bool | int | float


class Kind(IntEnum):
    """The kinds of spans, with OpenTelemetry's numbers."""

    INTERNAL = 0
    SERVER = 1
    CLIENT = 2


class Trace:
    """The place of one request of this process in its trace."""

    __slots__ = ("is_sampled", "parent_id", "span_id", "state", "trace_id")

    def __init__(self, trace_id: str, parent_id: str, span_id: int, is_sampled: bool, state: str = "") -> None:
        self.trace_id = trace_id
        """32 hexadecimal digits."""
        self.parent_id = parent_id
        """The span of the caller, 16 hexadecimal digits; empty without one."""
        self.span_id = span_id
        """The span of the request in this process."""
        self.is_sampled = is_sampled
        self.state = state
        """The ``tracestate``, to pass on as it is."""

    def traceparent(self, span_id: int | None = None) -> str:
        """Return the ``traceparent`` that names a span of this process as the parent: the request's own by default."""
        # These are the quickest of the formats.
        names = self.trace_id, self.span_id if span_id is None else span_id
        return "00-%s-%016x-01" % names if self.is_sampled else "00-%s-%016x-00" % names  # noqa: UP031

    def beneath(self, span_id: int) -> Trace:
        """Return the place of a part of this request, such as a task of a batch, which has a span of its own."""
        return Trace(self.trace_id, f"{self.span_id:016x}", span_id, self.is_sampled, self.state)


@dataclass(slots=True)
class Event:
    """A moment of a span."""

    name: str
    at_s: float
    """Of the monotonic clock, as all times here."""
    attributes: Mapping[str, Attribute] = field(default_factory=dict)


@dataclass(slots=True)
class Link:
    """A span of another trace, or elsewhere in the same, that a span has to do with."""

    trace_id: str
    span_id: int
    attributes: Mapping[str, Attribute] = field(default_factory=dict)


@dataclass(slots=True)
class Span:
    """A span that has ended."""

    name: str
    span_id: int
    parent_id: int
    """0: none."""
    start_s: float
    end_s: float
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    kind: Kind = Kind.INTERNAL
    is_remote: bool = False
    """Whether the parent is a span of another process."""
    error: str | None = None
    """Why it failed; None if it did not."""
    events: Sequence[Event] = ()
    links: Sequence[Link] = ()


class Tracer:
    """Begins the traces of a process, and exports their spans."""

    def __init__(self, sink: SpanSink, slow_s: float, *, follows: bool, share: float) -> None:
        """``follows``: the decision of a parent holds. ``share``: how many of the other traces are sampled, 0 to 1."""
        self._sink = sink
        self._slow_s = slow_s
        self._follows = follows
        self._below = round(share * _PARTS)
        # Ids of spans need not be random, only unlike all others.
        self._ids = itertools.count(random.getrandbits(62) + 1)
        self._tail = _Bucket(TAIL_RATE)

    def begin(self, traceparent: str | None, tracestate: str | None = None) -> Trace:
        """Begin the trace of a request by the headers that it came with; malformed ones are as good as none."""
        if traceparent and _TRACEPARENT.fullmatch(traceparent):
            trace_id, parent_id = traceparent[3:35], traceparent[36:52]
            if trace_id != _NO_TRACE and parent_id != _NO_SPAN:
                is_sampled = traceparent[54] in _SAMPLED if self._follows else self._decides(trace_id)
                state = tracestate if tracestate and len(tracestate) <= MAX_STATE_CHARS else ""
                return Trace(trace_id, parent_id, next(self._ids), is_sampled, state)
        trace_id = random.randbytes(16).hex()  # noqa: S311 - unlike all others, not secret
        return Trace(trace_id, "", next(self._ids), self._decides(trace_id))

    def _decides(self, trace_id: str) -> bool:
        # As Envoy's sampler does it, so that a mesh agrees. OpenTelemetry's samplers differ between languages.
        return int.from_bytes(bytes.fromhex(trace_id[:16]), "little") % _PARTS < self._below

    def settle(self, settings: telemetry.LogSettings) -> None:
        """Take over from when on a request is slow."""
        self._slow_s = settings.slow_s

    def new_id(self) -> int:
        """Return the id of one more span."""
        return next(self._ids)

    def keeps(self, trace: Trace, seconds: float, status: int = 200) -> bool:
        """Return whether the spans of a request that has ended are wanted: it is sampled, or slow, or failed (5xx).

        Requests that are not sampled count against a rate. Ask once a request.
        """
        if trace.is_sampled:
            return True
        return (seconds >= self._slow_s or status >= 500) and self._tail.take()

    def skips(self, traceparent: bytes, seconds: float, status: int = 200) -> bool:
        """Return whether nobody wants the spans of a request that has ended, as far as its ``traceparent`` tells.

        A process that needs no ids before the end of a request asks this first: it costs far less than :meth:`begin`.
        """
        return (
            self._follows
            and len(traceparent) == 55
            and traceparent[54] in _UNSAMPLED
            and seconds < self._slow_s
            and status < 500
        )

    def export(self, trace: Trace, spans: Sequence[Span]) -> None:
        """Export the spans of one request, without ever blocking. Those without the sampled flag are marked as tail."""
        self._sink.add(trace, spans)

    def families(self, prefix: str, labels: Mapping[str, str] | None = None) -> Iterator[Metric]:
        """Yield the metrics of the export, with ``labels`` on each."""
        labels = labels or {}
        spans = CounterMetricFamily(
            f"{prefix}_spans", "Spans of traces, by what has become of them.", labels=[*labels, "outcome"]
        )
        sink = self._sink
        for outcome, count in (("exported", sink.exported), ("failed", sink.failed), ("dropped", sink.dropped)):
            spans.add_metric([*labels.values(), outcome], count)
        yield spans
        limited = CounterMetricFamily(
            f"{prefix}_traces_limited",
            "Slow and failed requests without a trace, as too many came at once.",
            labels=list(labels),
        )
        limited.add_metric(list(labels.values()), self._tail.refused)
        yield limited

    async def close(self, timeout_s: float = FLUSH_S) -> None:
        """Export the spans that wait, for so long at most."""
        await self._sink.close(timeout_s)


class _Bucket:
    """A token bucket that holds the tokens of a second."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._left = rate
        self._at_s = clock()
        self.refused = 0

    def take(self) -> bool:
        now_s = self._clock()
        self._left = min(self._rate, self._left + (now_s - self._at_s) * self._rate)
        self._at_s = now_s
        if self._left < 1:
            self.refused += 1
            return False
        self._left -= 1
        return True


def from_environment(
    service: str, attributes: Mapping[str, str] | None = None, *, slow_s: float | None = None
) -> Tracer | None:
    """Return the tracer that the variables ``OTEL_*`` ask for, or None if they ask for none. Raises StartError.

    ``service`` is the name of the service, and ``attributes`` are those of its resource, as long as the variables say
    nothing else. A request that takes ``slow_s`` seconds is slow; None: as ``--slow`` says at the time.
    """
    if not is_wanted():
        return None
    follows, share = sampler()
    try:
        from atserving import otlp
    except ImportError as error:
        raise StartError(
            f"the variables OTEL_* ask for traces, but {error.name} is missing: pip install 'atserving[tracing]', "
            "or set OTEL_TRACES_EXPORTER=none"
        ) from None
    sink = otlp.sink(service, attributes or {})
    if slow_s is not None:
        return Tracer(sink, slow_s, follows=follows, share=share)
    tracer = Tracer(sink, telemetry.settings().slow_s, follows=follows, share=share)
    telemetry.follow(tracer.settle)
    return tracer


def is_wanted(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether the variables ask for traces. Raises StartError."""
    if variable("OTEL_SDK_DISABLED", environ).lower() == "true":
        return False
    exporter = variable("OTEL_TRACES_EXPORTER", environ).lower()
    if exporter not in ("", "otlp", "none"):
        raise StartError(f"OTEL_TRACES_EXPORTER is {exporter!r}, should be otlp or none")
    if exporter:
        return exporter == "otlp"
    return any(variable(f"OTEL_EXPORTER_OTLP_{kind}ENDPOINT", environ) for kind in ("TRACES_", ""))


def variable(name: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return a variable of the environment; empty if it is not set."""
    return environ.get(name, "").strip()


def sampler(environ: Mapping[str, str] = os.environ) -> tuple[bool, float]:
    """Return whether the decision of a parent holds, and the share of the other traces. Raises StartError."""
    name = variable("OTEL_TRACES_SAMPLER", environ).lower() or "parentbased_always_on"
    if name not in _SAMPLERS:
        raise StartError(f"OTEL_TRACES_SAMPLER is {name!r}, should be one of {', '.join(_SAMPLERS)}")
    follows, share = _SAMPLERS[name]
    if share is not None:
        return follows, share
    given = variable("OTEL_TRACES_SAMPLER_ARG", environ) or "1"
    try:
        share = float(given)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise StartError(f"OTEL_TRACES_SAMPLER_ARG is {given!r}, should be a share from 0 to 1")
    return follows, share
