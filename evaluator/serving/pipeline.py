"""The path of one request through an instance: admission, its resources, the worker; its deadline, metrics and log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import cast

import structlog
from google.protobuf.message import DecodeError

from atserving import link, uris
from atserving.errors import DeadlineExceeded, Internal, InvalidArgument, ServingError, Unavailable
from atserving.held import LARGE_BYTES, HeldBytes
from atserving.telemetry import RequestLog, request_id, trace_context, trace_id
from atserving.tracing import Trace
from atserving.v1 import evaluator_pb2
from evaluator.fetching.fetch_times import Fetches
from evaluator.fetching.resources import ResourceFetcher
from evaluator.limits import Budget, Limits, check_request
from evaluator.net_config import NetConfig
from evaluator.serving.calls import SupervisedCall
from evaluator.serving.capacity import Capacity
from evaluator.serving.link_server import Replier
from evaluator.serving.metrics import Metrics
from evaluator.serving.spans import Ended, Spans
from evaluator.serving.supervisor import WorkerSupervisor

log = structlog.get_logger()

_CALLER_GONE = 499
_MAX_TRACE_CHARS = 64


class Pipeline:
    """Answers calls, whatever transport brought them."""

    def __init__(
        self,
        app: str,
        version: str,
        config: NetConfig,
        *,
        worker: WorkerSupervisor,
        fetcher: ResourceFetcher,
        capacity: Capacity,
        metrics: Metrics,
        held: HeldBytes,
        spans: Spans | None = None,
    ) -> None:
        """Without ``spans``, trace nothing."""
        self.spans = spans
        self.worker = worker
        self.held = held
        self.capacity = capacity
        self.metrics = metrics
        self.log = log.bind(app=app, version=version)
        self.lines = RequestLog("evaluator", app=app, version=version)
        self._fetcher = fetcher
        self._limits: Limits = config.limits
        # Built-in nets take one image; a script may take groups.
        self._built_in = None if config.script else config.net

    def admit(self, id_: int, length: int, replier: Replier) -> bool:
        """Count the bytes of a long call that begins to arrive, and return True.

        Without room for them, or a place for the call, refuse it at once. It is logged under a new request id then.
        """
        try:
            self.capacity.check()
            self.take(length, large=True)
        except ServingError as error:
            Request(self, link.Call(id_, 0, 0, b"", b"", b""), replier).failed(error)
            return False
        return True

    def take(self, count: int, *, large: bool) -> None:
        """Count more bytes of a request. Raises ResourceExhausted if there is no room for them."""
        if not self.held.take(count, large=large):
            raise self.capacity.full("the instance holds as many bytes of requests and answers as it can", "memory")

    def begin(self, call: link.Call, replier: Replier, held: int | None = None) -> Request:
        """Begin a call. It replies once, perhaps at once, unless it is abandoned; it is counted and logged once.

        ``held`` bytes are counted for it, and given back at its end; None: it counts them itself.
        """
        request = Request(self, call, replier)
        request.begin(call, held)
        return request

    def read(self, serialized: link.Buffer) -> evaluator_pb2.InferRequest:
        """Return a request that has URIs. Raises InvalidArgument."""
        try:
            request = evaluator_pb2.InferRequest.FromString(cast(bytes, serialized))
        except DecodeError:
            raise InvalidArgument("the request is malformed") from None
        # The worker would refuse it too, but only after the download.
        check_request(request, self._built_in)
        return request

    async def fetch(
        self, request: evaluator_pb2.InferRequest, hold: Callable[[int], None], fetches: Fetches | None = None
    ) -> None:
        """Replace the URI of each resource by its bytes; ``hold`` counts them. Raises a ServingError."""
        # The worker checks the sizes of bodies.
        elsewhere = [each for each in request.data if each.HasField("uri")]
        await self._fetcher.replace(elsewhere, Budget(self._limits.max_request_bytes, hold), fetches)


class Request:
    """One request, from its arrival to its outcome.

    It has no task, future or context of its own unless the instance has to fetch a resource: the front handles
    thousands a second.
    """

    __slots__ = (
        "_ahead",
        "_batched",
        "_began_s",
        "_deadline_s",
        "_entered_s",
        "_fetches",
        "_fetching",
        "_held_bytes",
        "_id",
        "_ms",
        "_pipeline",
        "_replier",
        "_reqid",
        "_stays",
        "_trace",
        "_traceparent",
        "_work",
        "ended",
    )

    def __init__(self, pipeline: Pipeline, call: link.Call, replier: Replier) -> None:
        self.ended = False
        """Whether it has its outcome."""
        self._pipeline = pipeline
        self._replier = replier
        self._id = call.id
        self._reqid = request_id(call.reqid.decode(errors="replace"))
        self._traceparent = call.traceparent
        self._stays = bool(call.flags & link.STAY)
        self._batched = bool(call.flags & link.BATCHED)
        self._began_s = self._entered_s = time.monotonic()
        self._deadline_s = self._began_s + call.timeout_us / 1e6 if call.timeout_us else None
        # Its place among the requests in flight; 0: it has none.
        self._ahead = 0
        self._held_bytes = 0
        self._ms: dict[str, float] = {}
        self._work: SupervisedCall | None = None
        self._fetching: asyncio.Task[None] | None = None
        # Only of a request that fetches, or whose spans are exported.
        self._trace: Trace | None = None
        self._fetches: Fetches | None = None

    def begin(self, call: link.Call, held: int | None) -> None:
        """Begin the work. ``held`` bytes are counted for it already; None: it counts those of the call."""
        try:
            if held is None:
                self._hold(len(call.request))
            else:
                self._held_bytes = held
            if not call.flags & link.FETCH:
                self._ahead = self._pipeline.capacity.enter(batched=self._batched)
                self._ms["fetch_ms"] = 0.0
                self._submit(call.request)
                return
            request = self._pipeline.read(call.request)
            fetching = self._fetch(request, _hosts(request))
            self._fetching = asyncio.get_running_loop().create_task(fetching)
        except Exception as error:
            self._fail(error)

    def _hold(self, count: int) -> None:
        """Count more bytes of the request until its end. Raises ResourceExhausted if there is no room for them."""
        if self.ended:
            # Its fetch is about to be cancelled.
            return
        self._pipeline.take(count, large=self._held_bytes + count >= LARGE_BYTES)
        self._held_bytes += count

    async def _fetch(self, request: evaluator_pb2.InferRequest, hosts: set[str]) -> None:
        capacity, spans = self._pipeline.capacity, self._pipeline.spans
        if spans:
            self._trace = spans.begin(self._traceparent, request.tracestate)
            self._fetches = spans.fetches(self._trace)
        try:
            async with capacity.fetch(hosts, batched=self._batched):
                await self._pipeline.fetch(request, self._hold, self._fetches)
            self._entered_s = time.monotonic()
            if self.ended:
                capacity.leave(capacity.in_flight, self._entered_s)
                return
            self._ahead = capacity.in_flight
            self._ms["fetch_ms"] = round((self._entered_s - self._began_s) * 1000, 3)
            self._submit(request.SerializeToString())
        except Exception as error:
            self._ms.setdefault("fetch_ms", round((time.monotonic() - self._began_s) * 1000, 3))
            self._fail(error)

    def _submit(self, serialized: link.Buffer) -> None:
        self._work = self._pipeline.worker.submit(
            self._reqid.encode(), serialized, self._deadline_s, self, stays=self._stays, batched=self._batched
        )

    def answered(self, reply: link.Reply) -> None:
        """Take the worker's reply."""
        # A request waits here before it waits in the worker, which knows only of its own queue.
        waited_us = round((self._work.sent_s - self._entered_s) * 1e6) if self._work else 0
        queue_us = min(reply.queue_us + max(0, waited_us), link.MOST_U32)
        reply = reply._replace(id=self._id, queue_us=queue_us)
        ms = self._ms
        ms["decode_ms"] = reply.decode_us / 1000
        if reply.batch_size:
            ms["queue_ms"] = reply.queue_us / 1000
            ms["forward_ms"] = reply.forward_us / 1000
            ms["postprocess_ms"] = reply.postprocess_us / 1000
        try:
            error = _error(reply.response) if reply.outcome == link.ERROR else None
            held = len(reply.response) if len(reply.response) >= LARGE_BYTES else 0
            if held and not self._replier.hold(held):
                raise Unavailable("the instance holds as many bytes of unread answers as it can", refusal="memory")
        except Exception as failure:
            self._fail(failure, reply)
            return
        self._end(reply, error, reply, held)

    def failed(self, error: ServingError) -> None:
        """Take an error in place of the worker's reply."""
        self._fail(error)

    def expire(self) -> None:
        """End it with an error, since its deadline has passed."""
        self._stop()
        self._fail(DeadlineExceeded("the deadline passed"))

    def abandon(self) -> None:
        """End it without a reply, since its caller has left."""
        if not self.ended:
            self._stop()
            self._end(None, None)

    def _stop(self) -> None:
        """Stop the work at its next step; a forward pass that has begun finishes."""
        if self._fetching:
            self._fetching.cancel()
        if self._work:
            self._pipeline.worker.cancel(self._work)

    def _fail(self, error: Exception, answer: link.Reply | None = None) -> None:
        if not isinstance(error, ServingError):
            self._pipeline.log.error("request failed", **self._ids(), exc_info=error)
            error = Internal("the evaluator failed")
        response = evaluator_pb2.InferResponse(error=error.to_proto()).SerializeToString()
        self._end(link.Reply(self._id, link.ERROR, 0, 0, 0, 0, 0, 0, response), error, answer)

    def _end(
        self, reply: link.Reply | None, error: ServingError | None, answer: link.Reply | None = None, held: int = 0
    ) -> None:
        """Reply, count, log and trace, once. Without a reply the caller has left.

        ``answer`` is the worker's reply, if there is one. ``held`` bytes are counted for the reply.
        """
        if self.ended:
            return
        self.ended = True
        work = self._work
        # What worked on it refers back to it, and would keep its body in memory.
        self._work = self._fetching = None
        pipeline, ms = self._pipeline, self._ms
        pipeline.held.give(self._held_bytes)
        if self._ahead:
            pipeline.capacity.leave(self._ahead, self._entered_s)
        code, status = (error.code, error.status) if error else (0, 200)
        if reply is None:
            code = status = _CALLER_GONE
        else:
            if fetch_ms := ms.get("fetch_ms"):
                reply = link.with_fetch(reply, round(fetch_ms * 1000))
            self._replier.reply(reply, held)
        now_s = time.monotonic()
        seconds = now_s - self._began_s
        ms["total_ms"] = round(seconds * 1000, 3)
        pipeline.metrics.observe(status, ms, error.refusal if error else "", self._traceparent)
        if (spans := pipeline.spans) and (trace := spans.wanted(self._trace, self._traceparent, seconds, error)):
            self._trace = trace
            times = self._began_s, self._entered_s, now_s
            spans.export(trace, Ended(self._reqid, *times, status, error, answer, work, self._fetches))
        if pipeline.lines.wants(self._reqid, code, seconds):
            line: dict[str, object] = {"reqid": self._reqid, "code": code}
            if error:
                line["reason"] = error.message
            line.update(ms)
            if self._traceparent or self._trace:
                line.update(self._ids())
            pipeline.lines.write("info", "request finished", line)

    def _ids(self) -> dict[str, object]:
        """Return the fields by which a line is found with the others of its request."""
        ids: dict[str, object] = {"reqid": self._reqid}
        if self._traceparent:
            traceparent = self._traceparent.decode(errors="replace")
            ids["traceparent"] = traceparent[:_MAX_TRACE_CHARS]
            ids["trace_id"] = trace_id(trace_context(traceparent))
        if self._trace:
            ids["trace_id"] = self._trace.trace_id
        return ids


def fetches(request: evaluator_pb2.InferRequest) -> bool:
    """Return whether a request has a URI that is no data URI."""
    return any(True for _ in _remote(request))


def _hosts(request: evaluator_pb2.InferRequest) -> set[str]:
    return {uris.host(uri) for uri in _remote(request)}


def _remote(request: evaluator_pb2.InferRequest) -> Iterator[str]:
    return (each.uri for each in request.data if each.HasField("uri") and each.uri[:5].lower() != "data:")


def _error(response: link.Buffer) -> ServingError:
    return ServingError.from_proto(evaluator_pb2.InferResponse.FromString(cast(bytes, response)).error)
