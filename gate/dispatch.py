"""Runs one eval: admits the caller, sets the deadline, and leaves the rest to its attempts."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import structlog

from atserving import config, uris
from atserving.counting import MAX_GROUP, MAX_JSON_CHARS
from atserving.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ServingError,
    Unavailable,
)
from atserving.http2_stream import Headers
from atserving.telemetry import RequestLog, trace_id
from atserving.tracing import Tracer
from atserving.v1 import evaluator_pb2
from gate.admission import Caller, admit
from gate.attempts import Attempts
from gate.bodies import Body
from gate.connection import EvaluatorConnection
from gate.endpoint import Kind
from gate.limits import CallerLimits, Limits, Use
from gate.rate_limit_service import RateLimitService
from gate.record import Record
from gate.request_counts import LEFT, RequestCounts, refusal_of
from gate.responses import Response
from gate.router import Route, Router
from gate.shadow import Shadows
from gate.turns import Turns

log = structlog.get_logger()


MAX_KEY_BYTES = 256
"""The longest key by which a request keeps its version."""

# What a caller chooses is as long in a log line at most.
_MOST_NAME_CHARS, _MOST_REASON_CHARS = 80, 1000

MAX_SYNC_S = 2.0
"""How long a request waits for the first config of a gate."""


@dataclass(frozen=True)
class Task:
    """One eval: its app and version, and the request for the instance, which the dispatcher may change."""

    app: str
    version: str
    """Empty: the versions in production."""
    request: evaluator_pb2.InferRequest
    body: Body | None = None
    """A large resource, which ``request`` does not have: the only one."""

    def size(self) -> int:
        """Return its bytes."""
        return self.request.ByteSize() + (sum(map(len, self.body.parts)) if self.body else 0)


@dataclass(frozen=True)
class CallContext:
    """The context of a call: its id, caller, trace and deadline."""

    reqid: str
    caller: Caller
    traceparent: str | None = None
    """The caller's; with a trace of the gate's own, the one of that."""
    deadline: float | None = None
    """The caller's own deadline, in seconds of time.monotonic(); None without one."""
    started: float = field(default_factory=time.monotonic)
    batched: bool = False
    """Whether it is a task of a batch, which leaves room to other callers."""
    waits: Counter[tuple[str, str]] | None = None
    """How many tasks of its batch wait for an instance, by the app and version that they name; None without a batch."""
    headers: Headers | None = None
    """The headers of the request, one of which may be a key; a batch's are those of each of its tasks."""
    record: Record | None = None
    """The record of its attempts, if it is traced, or if its caller asks for the times."""


@dataclass(frozen=True)
class EvalResult:
    """An instance's response, and its version."""

    response: Response
    version: str


class End(NamedTuple):
    """The end of an eval, as the log and the metrics have it."""

    version: str
    """The version that was asked last; empty if none was."""
    status: int = 200
    code: int = 0
    reason: str = ""
    refusal: str = ""

    @staticmethod
    def of(error: ServingError) -> End:
        """Return the end of an eval that failed."""
        return End(error.version, error.status, error.code, error.message, refusal_of(error))


_LEFT = End("", LEFT, LEFT, "the caller has gone")
_UNEXPECTED = End("", Internal.status, Internal.status, "unexpected")


class Dispatcher:
    """Evaluates tasks on the instances of the router."""

    def __init__(
        self,
        router: Router[EvaluatorConnection],
        synced: asyncio.Event,
        shadows: Shadows,
        rate_limits: RateLimitService | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """``synced`` is set once the router has a config; before that, tasks wait for it.

        ``rate_limits`` counts over all gates. ``tracer`` begins the traces of requests; None: there are none.
        """
        self.tracer = tracer
        self._router = router
        self._shadows = shadows
        self._synced = synced
        self._requests = RequestLog("gate")
        self._limits = CallerLimits()
        self._rate_limits = rate_limits
        self.counts = RequestCounts(router.versions, router.instances)
        """The counts of all requests, for metrics."""
        self.turns = Turns()
        """The turns of apps, if the gate has more to do than it can at once."""

    def owner(self, task: Task, call: CallContext) -> str:
        """Return whose turn a task waits for: its app's, or that of all that will be refused, for any app."""
        try:
            return self._admit(task, call).app
        except ServingError:
            return ""

    async def eval(self, task: Task, call: CallContext) -> EvalResult:
        """Return the result of a task, and log one line for it, unless it may try again. Raises a ServingError."""
        end = _UNEXPECTED
        waits = False
        try:
            answer = await self._eval(task, call)
            end = End(answer.version)
            return answer
        except ServingError as error:
            end = End.of(error)
            waits = call.batched and isinstance(error, ResourceExhausted)
            raise
        except asyncio.CancelledError:
            end = _LEFT
            raise
        except Exception:
            log.exception("request failed", reqid=call.reqid, trace_id=trace_id(call.traceparent))
            raise Internal("the gate failed on this request") from None
        finally:
            if not waits:
                self.finished(task, call, end)

    def finished(self, task: Task, call: CallContext, end: End) -> None:
        """Log and count the end of a task. A batch does it for one that found no place until the batch gave it up."""
        seconds = time.monotonic() - call.started
        if self._requests.wants(call.reqid, end.code, seconds):
            fields = {
                "reqid": call.reqid,
                "app": task.app[:_MOST_NAME_CHARS],
                "version": end.version or task.version[:_MOST_NAME_CHARS],
                "code": end.code,
                "reason": end.reason[:_MOST_REASON_CHARS],
                "traceparent": call.traceparent,
                "trace_id": trace_id(call.traceparent),
                "total_ms": round(seconds * 1e3, 2),
            }
            self._requests.write("info", "request finished", fields)
        counts = self.counts.of(task.app)
        counts.count(end.version or self._asked(task), end.status)
        if end.refusal:
            counts.refusals[end.refusal] += 1
        else:
            counts.took(seconds, call.traceparent)
        if call.record:
            version = end.version or task.version[:_MOST_NAME_CHARS]
            call.record.finished(call, seconds, task.app[:_MOST_NAME_CHARS], version, end)

    def rejected(self, call: CallContext, error: ServingError, app: str = "") -> None:
        """Log and count a request that is rejected before it becomes an eval."""
        if self._requests.wants(call.reqid, error.code, 0.0):
            fields = {
                "reqid": call.reqid,
                "code": error.code,
                "reason": error.message[:_MOST_REASON_CHARS],
                "traceparent": call.traceparent,
                "trace_id": trace_id(call.traceparent),
            }
            self._requests.write("info", "request rejected", fields)
        self.counts.refused(app, error.status, refusal_of(error))
        if call.record:
            seconds = time.monotonic() - call.started
            call.record.finished(call, seconds, app[:_MOST_NAME_CHARS], "", End.of(error))

    @staticmethod
    def batch_finished(call: CallContext, batch: asyncio.Task[Any]) -> None:
        """Export the span of a batch that has ended; one that was rejected has exported it."""
        if call.record and (batch.cancelled() or not batch.exception()):
            seconds = time.monotonic() - call.started
            call.record.finished(call, seconds, "", "", _LEFT if batch.cancelled() else End(""))

    def _asked(self, task: Task) -> str:
        """Return the version that a task names, for its counts; empty if it names none, or none that exists."""
        if not task.version or not config.is_name(task.version) or not self._router.versions(task.app):
            return ""
        try:
            return self._router.route(task.app, task.version).version
        except NotFound:
            return ""

    async def _eval(self, task: Task, call: CallContext) -> EvalResult:
        if not self._synced.is_set():
            await self._wait_synced(call)
        route = self._admit(task, call)
        if call.record and call.record.state:
            task.request.tracestate = call.record.state
        kind = Kind(call.batched, self._check(task, call))
        key = b"" if route.version else _key(route, call)
        began_s = time.monotonic() if route.shadow else 0.0
        deadline = call.started + route.timeout_s
        if call.deadline is not None:
            deadline = min(deadline, call.deadline)
        limits = route.limits
        use = await self._enter(task, call, limits) if limits else None
        counts = self.counts.of(route.app)
        counts.in_flight += 1
        try:
            result = EvalResult(*await Attempts(self._router, task, call, route, kind, key, deadline, counts).run())
        except ResourceExhausted:
            if use and limits and call.batched:
                # The batch tries again.
                self._limits.refund(use, limits, task.size)
                if self._rate_limits:
                    self._rate_limits.give_back(limits, use, task.size)
            raise
        except TimeoutError as late:
            after_s = round(time.monotonic() - call.started, 3)
            raise DeadlineExceeded(
                f"app {task.app!r} did not answer within {after_s} s", version="".join(late.args)
            ) from None
        finally:
            counts.in_flight -= 1
            if use:
                use.in_flight -= 1
        if route.shadow:
            self._shadows.consider(task, call, route, kind.fetches, result, time.monotonic() - began_s)
        return result

    async def _enter(self, task: Task, call: CallContext, limits: Limits) -> Use:
        """Count a request in flight, here and at the rate limit service. Raises ResourceExhausted."""
        use = self._limits.enter(task.app, call.caller.uid, limits, task.size)
        if self._rate_limits:
            try:
                await self._rate_limits.count(task.app, call.caller.uid, limits, use, task.size)
            except BaseException:
                # It costs this gate's own limit, so a flood asks the service no more often than the limit allows.
                use.in_flight -= 1
                raise
        return use

    async def _wait_synced(self, call: CallContext) -> None:
        """Wait for the first config, which a restarted gate has within milliseconds. Raises Unavailable.

        Envoy may send requests to a gate that came back before a health check has seen it.
        """
        wait_s = MAX_SYNC_S if call.deadline is None else min(MAX_SYNC_S, call.deadline - time.monotonic())
        # In a task of its own, as a timeout needs one.
        waiting = asyncio.get_running_loop().create_task(asyncio.wait_for(self._synced.wait(), wait_s))
        try:
            await waiting
        except TimeoutError:
            if call.deadline is not None and call.deadline <= time.monotonic():
                raise DeadlineExceeded("the deadline passed before this gate had a config") from None
            raise Unavailable("this gate has no config yet", refusal="starting") from None

    def _admit(self, task: Task, call: CallContext) -> Route:
        """Return the route of a task that its caller may take. Raises a ServingError."""
        if not task.app:
            raise InvalidArgument("no app given")
        if not config.is_name(task.app):
            raise NotFound("unknown app: its name is not one an app can have")
        try:
            if task.version and not config.is_name(task.version):
                raise NotFound("unknown version: its name is not one a version can have")
            route = self._router.route(task.app, task.version)
        except NotFound:
            # Only those who may use an app learn which versions it has.
            admit(call.caller, task.app, *self._router.rules(task.app))
            raise
        admit(call.caller, task.app, route.metadata, route.default_metadata)
        return route

    @staticmethod
    def _check(task: Task, call: CallContext) -> bool:
        """Check what the request brings, and put the caller's uid into its URIs. Raises InvalidArgument.

        Return whether an instance has to fetch a resource.
        """
        if task.body:
            _check_json(len(task.request.params_json) + len(task.body.attribute_json))
            return False
        if not task.request.data:
            raise InvalidArgument("no data given")
        if len(task.request.data) > MAX_GROUP:
            raise InvalidArgument(f"the request has {len(task.request.data)} resources, more than {MAX_GROUP}")
        _check_json(len(task.request.params_json) + sum(len(each.attribute_json) for each in task.request.data))
        fetches = False
        for resource in task.request.data:
            match resource.WhichOneof("source"):
                case None:
                    raise InvalidArgument("data without a uri or a body")
                case "uri" if resource.uri[:5].lower() != "data:":
                    resource.uri = uris.with_caller(resource.uri, call.caller.uid)
                    fetches = True
        return fetches


def _key(route: Route, call: CallContext) -> bytes:
    """Return the key by which a request keeps its version; empty without one. Raises InvalidArgument."""
    key = call.headers.get(route.key_header) if call.headers is not None else None
    if key is None:
        return b""
    if len(key) > MAX_KEY_BYTES:
        raise InvalidArgument(f"the header {route.key_header!r} is longer than {MAX_KEY_BYTES} characters")
    return key


def _check_json(chars: int) -> None:
    """Raise InvalidArgument for more JSON than a request may have: evaluators parse it while other callers wait."""
    if chars > MAX_JSON_CHARS:
        raise InvalidArgument(f"params and attributes are longer than {MAX_JSON_CHARS} characters")
