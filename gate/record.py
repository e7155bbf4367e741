"""The record of a request: what it meets in a gate, for its trace and for the header ``server-timing``.

Only requests that are traced, or whose caller asks for the header, have one. It holds numbers; spans are made of them
at the end of a request, if its trace is exported.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from atserving import link, tracing
from atserving.config import Instance
from atserving.http2_stream import Headers
from atserving.tracing import Attribute, Kind, Span, Trace, Tracer
from gate.responses import Response

if TYPE_CHECKING:
    from gate.dispatch import CallContext, End

TIMING = "x-serving-timing"
"""The header by which a caller asks for ``server-timing``; its value is 1."""

MOST_ATTEMPTS = 32
"""How many attempts a record keeps: the first ones, and the last."""

_ANSWERS = ("ok", "error")
# Statuses from here on are failures of the server, as OpenTelemetry has it.
_FAILED = 500
_MOST_REASON_CHARS = 1000
_STATE = re.compile(rf"[\x20-\x7e]{{1,{tracing.MAX_STATE_CHARS}}}")


class Attempt:
    """One attempt: a call of one instance."""

    __slots__ = ("began_s", "cause", "ended_s", "fetch_us", "instance", "outcome", "span_id", "stages", "tried")

    def __init__(self, instance: Instance, cause: str, tried: int) -> None:
        self.instance = instance
        self.cause = cause
        """Why there is one more attempt; empty for the first."""
        self.tried = tried
        """How many instances had been asked before."""
        self.span_id = 0
        """0: it has none yet."""
        self.began_s = time.monotonic()
        self.ended_s = 0.0
        self.outcome = ""
        """``ok``, ``error``, ``timeout``, or why there was another attempt; empty while it lasts."""
        self.stages: tuple[int, ...] = ()
        """The microseconds of decode, queue, forward and postprocess, and the size of the batch; empty without a reply.
        """
        self.fetch_us = 0

    def replied(self, reply: link.Reply, response: Response) -> None:
        """Take note of the reply, which may be a refusal."""
        self.ended_s = time.monotonic()
        self.outcome = "error" if reply.outcome else "ok"
        self.stages = reply[2:7]
        self.fetch_us = response.fetch_us


class Record:
    """The attempts and times of one request: an eval, a batch, or an eval that is a task of a batch."""

    __slots__ = ("attempts", "is_task", "is_timed", "name", "state", "trace", "tracer", "turn_s")

    def __init__(self, name: str, tracer: Tracer | None, trace: Trace | None, state: str) -> None:
        """``tracer`` and ``trace`` are None if the gate traces nothing."""
        self.name = name
        """The name of its span."""
        self.tracer = tracer
        self.trace = trace
        self.state = state
        """The ``tracestate`` to pass on; empty for none."""
        self.is_timed = False
        """Whether the caller asks for ``server-timing``."""
        self.is_task = False
        """Whether it is a task of a batch."""
        self.turn_s = 0.0
        """When its app had its turn, if it had to wait for that."""
        self.attempts: list[Attempt] = []

    def task(self) -> Record:
        """Return the record of a task of a batch."""
        trace = self.trace.beneath(self.tracer.new_id()) if self.tracer and self.trace else None
        record = Record("eval", self.tracer, trace, self.state)
        record.is_task = True
        return record

    def ask(self, instance: Instance, cause: str, tried: int) -> None:
        """Take note of an attempt that begins."""
        attempt = Attempt(instance, cause, tried)
        if len(self.attempts) < MOST_ATTEMPTS:
            self.attempts.append(attempt)
        else:
            self.attempts[-1] = attempt

    def traceparent(self, otherwise: str | None) -> str | None:
        """Return the ``traceparent`` for the present attempt.

        It names the attempt as the parent if the trace is sampled. Others are rarely exported, so they do with the one
        of the request, ``otherwise``.
        """
        if not self.tracer or not self.trace or not self.trace.is_sampled:
            return otherwise
        attempt = self.attempts[-1]
        attempt.span_id = self.tracer.new_id()
        return self.trace.traceparent(attempt.span_id)

    def failed(self, instance: Instance, outcome: str) -> None:
        """Take note of an attempt whose answer does not count: a refusal, or none at all."""
        for attempt in self.attempts[::-1]:
            if attempt.instance is instance:
                attempt.outcome = outcome
                attempt.ended_s = attempt.ended_s or time.monotonic()
                return

    def timing(self, started_s: float) -> str:
        """Return the ``server-timing`` of a request that ends now (W3C Server Timing), in milliseconds."""
        total_ms = (time.monotonic() - started_s) * 1e3
        entries: list[tuple[str, float]] = []
        if self.attempts:
            first = self.attempts[0]
            last = next((each for each in self.attempts if each.outcome in _ANSWERS), self.attempts[-1])
            if last is not first:
                entries.append(("retry", (last.began_s - first.began_s) * 1e3))
            entries += _stages(last)
            entries.insert(0, ("gate", max(0.0, total_ms - sum(ms for _, ms in entries))))
        entries.append(("total", total_ms))
        return ", ".join(f"{name};dur={round(ms, 3)}" for name, ms in entries)

    def finished(self, call: CallContext, seconds: float, app: str, version: str, end: End) -> None:
        """Export the spans of a request that has ended ``seconds`` after its start, if they are wanted."""
        tracer, trace = self.tracer, self.trace
        if tracer and trace and tracer.keeps(trace, seconds, end.status):
            self._export(tracer, trace, call, call.started + seconds, app, version, end)

    def _export(
        self, tracer: Tracer, trace: Trace, call: CallContext, now_s: float, app: str, version: str, end: End
    ) -> None:
        parent_id = int(trace.parent_id, 16) if trace.parent_id else 0
        spans = [
            Span(
                self.name,
                trace.span_id,
                parent_id,
                call.started,
                now_s,
                _attributes(app, version, call.reqid, end),
                Kind.INTERNAL if self.is_task else Kind.SERVER,
                is_remote=not self.is_task,
                error=end.reason[:_MOST_REASON_CHARS] if end.status >= _FAILED else None,
            )
        ]
        if self.turn_s:
            spans.append(Span("wait for turn", tracer.new_id(), trace.span_id, call.started, self.turn_s))
        spans += [_span(each, each.span_id or tracer.new_id(), trace.span_id, now_s) for each in self.attempts]
        tracer.export(trace, spans)


def begin(headers: Headers, traceparent: str | None, tracer: Tracer | None, name: str) -> Record | None:
    """Return the record of a request with these headers, or None if nobody wants one.

    ``traceparent`` is its header; without a tracer, None if that is malformed.
    """
    is_timed = headers.get(TIMING) == b"1"
    state = ""
    if traceparent and (states := headers.get_all("tracestate")):
        state = _state(states)
    if tracer:
        trace = tracer.begin(traceparent, state)
        record = Record(name, tracer, trace, trace.state)
    elif is_timed or state:
        record = Record(name, None, None, state)
    else:
        return None
    record.is_timed = is_timed
    return record


def _state(states: Sequence[bytes]) -> str:
    """Return several headers as one; empty if they are no text, or too long."""
    state = b",".join(states).decode("latin-1")
    return state if _STATE.fullmatch(state) else ""


def _attributes(app: str, version: str, reqid: str, end: End) -> dict[str, Attribute]:
    attributes: dict[str, Attribute] = {"atserving.reqid": reqid, "http.response.status_code": end.status}
    if app:
        attributes["atserving.app"] = app
    if version:
        attributes["atserving.version"] = version
    if end.code not in (0, end.status):
        attributes["atserving.code"] = end.code
    if end.refusal:
        attributes["atserving.refusal"] = end.refusal
    if end.status >= _FAILED:
        attributes["error.type"] = str(end.status)
    elif end.reason:
        attributes["atserving.reason"] = end.reason[:_MOST_REASON_CHARS]
    return attributes


def _span(attempt: Attempt, span_id: int, parent_id: int, now_s: float) -> Span:
    outcome = attempt.outcome or "abandoned"
    instance = attempt.instance
    attributes: dict[str, Attribute] = {
        "atserving.instance": instance.id,
        "atserving.version": instance.version,
        "atserving.outcome": outcome,
        "server.address": instance.address,
    }
    if attempt.tried:
        attributes["atserving.tried"] = attempt.tried
    if attempt.cause:
        attributes["atserving.cause"] = attempt.cause
    is_error = outcome not in ("ok", "abandoned")
    if is_error:
        attributes["error.type"] = outcome
    return Span(
        "attempt",
        span_id,
        parent_id,
        attempt.began_s,
        attempt.ended_s or now_s,
        attributes,
        Kind.CLIENT,
        error="" if is_error else None,
    )


def _stages(attempt: Attempt) -> list[tuple[str, float]]:
    """Return the milliseconds of the stages of an attempt; of one without an answer, how long the instance had it."""
    if not attempt.stages or attempt.outcome not in _ANSWERS:
        return [("instance", ((attempt.ended_s or time.monotonic()) - attempt.began_s) * 1e3)]
    decode_us, queue_us, forward_us, postprocess_us, batch_size = attempt.stages
    stages = [("fetch", attempt.fetch_us), ("decode", decode_us), ("queue", queue_us)]
    if batch_size:
        stages += [("forward", forward_us), ("post", postprocess_us)]
    # A stage that a request did not reach is left out.
    return [(name, us / 1e3) for name, us in stages if us or (batch_size and name != "fetch")]
