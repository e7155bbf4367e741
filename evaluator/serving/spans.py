"""The spans of requests (:mod:`atserving.tracing`), made at the end of each request whose trace is wanted.

A request has the span ``infer``, with one for each fetch and each stage beneath it. A batch has a trace of its own,
``batch``, since it has many parents: it is linked to its requests, and the ``forward`` of each to it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from typing import NamedTuple

from atserving import link
from atserving.errors import ServingError
from atserving.tracing import Attribute, Event, Kind, Link, Span, Trace, Tracer, variable
from evaluator.fetching.fetch_times import Fetch, Fetches
from evaluator.serving import stages
from evaluator.serving.calls import SupervisedCall
from evaluator.serving.report import Report
from evaluator.serving.stages import Stage
from evaluator.serving.supervisor import WorkerSupervisor

# The replies of a batch come together. Its span waits for so long for the requests that are linked to it.
_BATCH_S = 1.0
_MAX_REASON_CHARS = 256
# Statuses from here on are failures of the server, as OpenTelemetry has it.
_FAILED = 500


class Ended(NamedTuple):
    """A request that has ended, with times of the monotonic clock."""

    reqid: str
    began_s: float
    entered_s: float
    """When its resources were there."""
    ended_s: float
    status: int
    error: ServingError | None
    reply: link.Reply | None
    """The worker's; None without one."""
    work: SupervisedCall | None
    """None if the worker was not asked."""
    fetches: Fetches | None


class Batch:
    """A batch with requests whose traces are wanted."""

    def __init__(self, report: Report, span_id: int, forward: Stage, postprocess: Stage, size: int) -> None:
        self.report = report
        self.trace_id = f"{random.getrandbits(128) or 1:032x}"
        self.span_id = span_id
        self.began_s, self.ended_s = forward.began_s, postprocess.ended_s
        self.size = size
        self.links: list[Link] = []
        self.is_sampled = False


class Spans:
    """Exports the spans of one instance. Its worker tells times (:mod:`evaluator.serving.report`)."""

    def __init__(self, tracer: Tracer, worker: WorkerSupervisor, **names: str) -> None:
        """``names``, such as the app, become attributes of the spans of requests and batches."""
        self._tracer = tracer
        self._worker = worker
        self._names = {f"atserving.{name}": value for name, value in names.items()}
        # The standard variable; hosts of resources are the only ones outside the mesh.
        propagators = variable("OTEL_PROPAGATORS") or "tracecontext"
        self._tells_hosts = "tracecontext" in (each.strip() for each in propagators.split(","))
        self._batch: Batch | None = None
        self._waiting: dict[Batch, asyncio.TimerHandle] = {}

    def close(self) -> None:
        """Export the batches that wait."""
        for batch in list(self._waiting):
            self._export_batch(batch)

    def begin(self, traceparent: bytes, tracestate: str = "") -> Trace:
        """Begin the trace of a request."""
        # It becomes a header. Gates check it, direct callers may send anything.
        state = tracestate if tracestate.isascii() and tracestate.isprintable() else ""
        return self._tracer.begin(traceparent.decode(errors="replace"), state)

    def fetches(self, trace: Trace) -> Fetches:
        """Return what takes note of a request's fetches. The hosts get the trace with the id of each fetch's span."""

        def begin() -> Fetch:
            span_id = self._tracer.new_id()
            headers = {"traceparent": trace.traceparent(span_id)}
            if trace.state:
                headers["tracestate"] = trace.state
            return Fetch(span_id, headers if self._tells_hosts else None)

        return Fetches(begin)

    def wanted(
        self, trace: Trace | None, traceparent: bytes, seconds: float, error: ServingError | None
    ) -> Trace | None:
        """Return the trace of a request that has ended if its spans are wanted. Ask once a request."""
        # A request that another instance takes has not failed.
        status = error.status if error and not error.refused else 200
        if not trace:
            if self._tracer.skips(traceparent, seconds, status):
                return None
            trace = self.begin(traceparent)
        return trace if self._tracer.keeps(trace, seconds, status) else None

    def export(self, trace: Trace, ended: Ended) -> None:
        """Export the spans of a request. Call this amid the worker's reply, if there is one."""
        reply, work, error = ended.reply, ended.work, ended.error
        attributes: dict[str, Attribute] = {
            **self._names,
            "atserving.reqid": ended.reqid,
            "http.response.status_code": ended.status,
        }
        if error:
            attributes |= _failure(error)
        if work and work.batched:
            attributes["atserving.batched"] = True
        if work and work.deaths_s:
            attributes["atserving.worker_deaths"] = len(work.deaths_s)
        spans = [_fetch_span(each, trace.span_id, ended.ended_s) for each in ended.fetches.all] if ended.fetches else []
        if work:
            spans += self._stage_spans(trace, ended, work)
        if reply and reply.batch_size:
            attributes["atserving.batch_size"] = reply.batch_size
        infer = Span(
            "infer",
            trace.span_id,
            int(trace.parent_id or "0", 16),
            ended.began_s,
            ended.ended_s,
            attributes,
            Kind.SERVER,
            is_remote=True,
            error=error.message[:_MAX_REASON_CHARS] if error and error.status >= _FAILED else None,
            events=self._events(ended),
        )
        self._tracer.export(trace, [infer, *spans])

    def _stage_spans(self, trace: Trace, ended: Ended, work: SupervisedCall) -> list[Span]:
        reply, report = ended.reply, self._worker.report
        if not reply:
            # An error for all is none of what the worker does for one.
            running = self._worker.working(work) if ended.status in (499, 504) else None
            found = stages.unanswered(ended.entered_s, ended.ended_s, running)
            return [self._span(trace, each) for each in found]
        prepared_s = report.prepared_s(self._worker.replies) if report else 0.0
        found = stages.answered(ended.entered_s, ended.ended_s, reply, prepared_s, report)
        spans = [self._span(trace, each) for each in found]
        if report and found[-1].name == "postprocess":
            forward = spans[-2]
            batch = self._join(report, trace, found[-2], found[-1], reply.batch_size)
            forward.links = [Link(batch.trace_id, batch.span_id)]
            forward.attributes = {"atserving.batch_size": reply.batch_size}
            if report.again:
                forward.attributes = {**forward.attributes, "atserving.again": True}
        return spans

    def _span(self, trace: Trace, stage: Stage) -> Span:
        attributes: Mapping[str, Attribute] = {} if stage.is_whole else {"atserving.unfinished": True}
        return Span(stage.name, self._tracer.new_id(), trace.span_id, stage.began_s, stage.ended_s, attributes)

    def _events(self, ended: Ended) -> list[Event]:
        work = ended.work
        if not work:
            return []
        events = [Event("worker died", each) for each in work.deaths_s]
        if work.ended and work.sent_s:
            events.append(Event("suspect retried", work.sent_s))
        away_s, back_s = self._worker.last_away_s
        if ended.began_s <= away_s <= ended.ended_s:
            events.append(Event("instance away", away_s))
        if ended.began_s <= back_s <= ended.ended_s:
            events.append(Event("instance back", back_s))
        if ended.error and ended.error.refused:
            events.append(Event("handed back", ended.ended_s))
        return sorted(events, key=lambda each: each.at_s)

    def _join(self, report: Report, trace: Trace, forward: Stage, postprocess: Stage, size: int) -> Batch:
        """Return the batch of a request, linked to it."""
        batch = self._batch
        if batch is None or batch.report is not report:
            batch = self._batch = Batch(report, self._tracer.new_id(), forward, postprocess, size)
            loop = asyncio.get_running_loop()
            self._waiting[batch] = loop.call_later(_BATCH_S, self._export_batch, batch)
        batch.links.append(Link(trace.trace_id, trace.span_id))
        batch.is_sampled |= trace.is_sampled
        return batch

    def _export_batch(self, batch: Batch) -> None:
        self._waiting.pop(batch).cancel()
        attributes: dict[str, Attribute] = {**self._names, "atserving.batch_size": batch.size}
        span = Span("batch", batch.span_id, 0, batch.began_s, batch.ended_s, attributes, links=batch.links)
        self._tracer.export(Trace(batch.trace_id, "", batch.span_id, batch.is_sampled), [span])


def _failure(error: ServingError) -> dict[str, Attribute]:
    attributes: dict[str, Attribute] = {}
    if error.status >= _FAILED:
        attributes["error.type"] = str(error.status)
    else:
        attributes["atserving.reason"] = error.message[:_MAX_REASON_CHARS]
    if error.code != error.status:
        attributes["atserving.code"] = error.code
    if error.refused:
        attributes["atserving.refused"] = True
    return attributes


def _fetch_span(fetch: Fetch, parent_id: int, ended_s: float) -> Span:
    attributes: dict[str, Attribute] = {"http.request.method": "GET"}
    if fetch.hops:
        _, scheme, host, port = fetch.hops[-1]
        attributes |= {"url.scheme": scheme, "server.address": host, "server.port": port}
    if len(fetch.hops) > 1:
        attributes["http.request.resend_count"] = len(fetch.hops) - 1
    if fetch.status:
        attributes["http.response.status_code"] = fetch.status
    if fetch.error:
        attributes["error.type"] = str(fetch.status) if fetch.status >= 400 else fetch.error
    elif fetch.ended_s:
        attributes["http.response.body.size"] = fetch.size
    else:
        attributes["atserving.unfinished"] = True
    return Span(
        "fetch",
        fetch.span_id,
        parent_id,
        fetch.began_s,
        fetch.ended_s or ended_s,
        attributes,
        Kind.CLIENT,
        error=fetch.error or None,
        events=[
            Event("redirected", at_s, {"server.address": host, "server.port": port})
            for at_s, _, host, port in fetch.hops[1:]
        ],
    )
