"""The gate's services: they translate requests, pass them to the dispatcher, and translate its results back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

import structlog
from google.api import httpbody_pb2
from grpc import StatusCode

from atserving import wire
from atserving.coroutines import Running
from atserving.counting import MAX_GROUP, TooMany, check_repeated
from atserving.errors import (
    Internal,
    InvalidArgument,
    ResourceExhausted,
    ServingError,
    Unavailable,
)
from atserving.grpc_call import Call, GrpcError, parsed
from atserving.grpc_server import Server
from atserving.grpc_status import grpc_status
from atserving.held import HeldBytes
from atserving.telemetry import request_id, trace_context, trace_id
from atserving.tracing import Tracer
from atserving.v1 import edge_pb2, evaluator_pb2, serving_pb2
from atserving.wire import LARGE_BYTES, Buffer, cut_tail
from gate import edge
from gate.batch import run_batch
from gate.bodies import Body
from gate.callers import Callers
from gate.dispatch import CallContext, Dispatcher, EvalResult, Task
from gate.record import TIMING, begin
from gate.request_counts import LEFT
from gate.responses import LargeResponse

log = structlog.get_logger()

BATCH_CONCURRENCY = 32
"""How many items of a batch run at once."""

_DATA = serving_pb2.EvalRequest.DATA_FIELD_NUMBER
_FEW = 16
_EXTENSIONS = httpbody_pb2.HttpBody.EXTENSIONS_FIELD_NUMBER
_TASKS = serving_pb2.BatchRequest.TASKS_FIELD_NUMBER
_RESULTS = serving_pb2.BatchResponse.RESULTS_FIELD_NUMBER
_ResultT = TypeVar("_ResultT")


def read_call(
    call: Call, deadline: float | None, callers: Callers, tracer: Tracer | None = None, name: str = "eval"
) -> CallContext:
    """Read a call's headers. An invalid request id gives way to the edge's own. ``name`` is that of its span."""
    traceparent = call.header("traceparent")
    if tracer is None:
        traceparent = trace_context(traceparent)
    wanted = tracer or traceparent or call.headers.get(TIMING)
    record = begin(call.headers, traceparent, tracer, name) if wanted else None
    return CallContext(
        reqid=request_id(call.header("x-reqid"), call.header("x-request-id")),
        caller=callers.of(call.headers),
        traceparent=record.trace.traceparent() if record and record.trace else traceparent,
        deadline=deadline,
        started=time.monotonic(),
        headers=call.headers,
        record=record,
    )


def _begin(
    dispatcher: Dispatcher,
    task: Task,
    call: Call,
    context: CallContext,
    answer: Callable[[EvalResult], None],
    fail: Callable[[ServingError], None],
) -> None:
    """Evaluate the task of a call, at once or when it is its app's turn."""
    turns = dispatcher.turns
    if turns.is_free():
        _run(call, context, dispatcher.eval(task, context), answer, fail)
        return
    owner = dispatcher.owner(task, context)
    if turns.refuses(owner):
        error = ResourceExhausted(
            f"too many requests to app {task.app[:80]!r} wait in this gate", retry_after_s=1.0, refusal="turns"
        )
        dispatcher.rejected(context, error, task.app)
        fail(error)
        return
    # The task goes with its caller.
    kept = [task]
    call.on_gone = kept.clear
    turns.wait(owner, partial(_take_turn, dispatcher, owner, kept, call, context, answer, fail))


def _take_turn(
    dispatcher: Dispatcher,
    owner: str,
    kept: list[Task],
    call: Call,
    context: CallContext,
    answer: Callable[[EvalResult], None],
    fail: Callable[[ServingError], None],
) -> None:
    if kept:
        if context.record:
            context.record.turn_s = time.monotonic()
        _run(call, context, dispatcher.eval(kept[0], context), answer, fail)
    else:
        dispatcher.counts.of(owner).count("", LEFT)


def _run(
    call: Call,
    context: CallContext,
    work: Coroutine[Any, Any, _ResultT],
    answer: Callable[[_ResultT], None],
    fail: Callable[[ServingError], None],
) -> None:
    """Run the work of a call, and answer it by its result or its error. The caller's departure cancels the work."""

    def done(result: _ResultT | None, error: BaseException | None) -> None:
        if isinstance(error, asyncio.CancelledError):
            return
        try:
            if isinstance(error, ServingError):
                # The frames of its traceback hold it in turn, and the request, until the next garbage collection.
                fail(error.with_traceback(None))
            elif error is None:
                answer(result)  # type: ignore[arg-type] # without an error there is a result
            else:
                raise error
        except Exception:
            log.exception("request failed", reqid=context.reqid, trace_id=trace_id(context.traceparent))
            fail(Internal("the gate failed on this request"))

    running = Running(work, done)
    if not running.done:
        call.on_gone = running.cancel


class ServingService:
    """The typed interface, native gRPC."""

    def __init__(self, dispatcher: Dispatcher, max_batch: int, held: HeldBytes, callers: Callers) -> None:
        self._dispatcher = dispatcher
        self._callers = callers
        self._max_batch = max_batch
        self._held = held

    def register(self, server: Server) -> None:
        """Answer the service's calls on a server."""
        server.unary("/atserving.v1.ServingService/Eval", self.eval, self._full)
        server.unary("/atserving.v1.ServingService/Batch", self.batch, self._full)

    def eval(self, call: Call) -> None:
        app = ""
        try:
            context = read_call(call, call.deadline(), self._callers, self._dispatcher.tracer)
            is_large = call.size >= LARGE_BYTES
            task = _large_typed_eval(call) if is_large else None
            if task is None:
                message = call.take_message()
                check_repeated(message, MAX_GROUP, _DATA)
                task = task_of(parsed(serving_pb2.EvalRequest(), message))
            if is_large:
                app = task.app
                _count_for(app, call)
        except GrpcError as error:
            _refuse_message(self._dispatcher, call, error)
            return
        except TooMany:
            self._reject(call, context, edge.too_many_resources())
            return
        except ServingError as error:
            self._reject(call, context, error, app)
            return
        answer, fail = partial(self._answer, call, context), partial(_abort, call, context)
        _begin(self._dispatcher, task, call, context, answer, fail)

    def _full(self, call: Call) -> None:
        self._reject(call, read_call(call, None, self._callers), _holds_too_much())

    def _reject(self, call: Call, context: CallContext, error: ServingError, app: str = "") -> None:
        self._dispatcher.rejected(context, error, app)
        _abort(call, context, error)

    @staticmethod
    def _answer(call: Call, context: CallContext, result: EvalResult) -> None:
        headers = [("x-reqid", context.reqid), ("x-serving-version", result.version)]
        _add_timing(headers, context)
        call.finish(*write_response(result), headers=headers)

    def batch(self, call: Call) -> None:
        try:
            context = read_call(call, call.deadline(), self._callers, self._dispatcher.tracer, "batch")
            message = call.take_message()
            check_repeated(message, self._max_batch, _TASKS, (self._max_batch * MAX_GROUP, _DATA))
            request = parsed(serving_pb2.BatchRequest(), message)
            edge.check_batch(len(request.tasks), self._max_batch)
            tasks = [task_of(each) for each in request.tasks]
            _count_batch(tasks, call)
        except GrpcError as error:
            _refuse_message(self._dispatcher, call, error)
            return
        except TooMany:
            most = f"{self._max_batch} tasks, or {self._max_batch * MAX_GROUP} resources"
            self._reject(call, context, InvalidArgument(f"the batch has more than {most}"))
            return
        except ServingError as error:
            self._reject(call, context, error)
            return

        def answer(results: list[EvalResult | ServingError]) -> None:
            parts: list[Buffer] = []
            for each in map(write_response, results):
                parts += (wire.field_head(_RESULTS, sum(map(len, each))), *each)
            headers = [("x-reqid", context.reqid)]
            _add_timing(headers, context)
            call.finish(*parts, headers=headers)

        work = _batch(self._dispatcher, tasks, context, self._held)
        _run(call, context, work, answer, partial(_abort, call, context))


def _batch(
    dispatcher: Dispatcher, tasks: list[Task] | list[Task | ServingError], context: CallContext, held: HeldBytes
) -> Coroutine[Any, Any, list[EvalResult | ServingError]]:
    async def run() -> list[EvalResult | ServingError]:
        # A batch waits for many evals at once, which takes a task.
        batch = run_batch(dispatcher, tasks, context, BATCH_CONCURRENCY, held)
        running = asyncio.get_running_loop().create_task(batch)
        if context.record:
            running.add_done_callback(partial(dispatcher.batch_finished, context))
        return await running

    return run()


def _holds_too_much() -> Unavailable:
    return Unavailable(
        "the gate holds as many bytes of requests and answers as it may", retry_after_s=1.0, refusal="memory"
    )


def _count_for(app: str, call: Call) -> None:
    """Count a large call as one of its app. Raises ResourceExhausted: a slow app leaves room to the others."""
    if not call.belong_to(app):
        whose = f"the large requests of app {app[:80]!r}" if app else "large batches of several apps"
        message = f"{whose} hold as many bytes in this gate as they may"
        raise ResourceExhausted(message, retry_after_s=1.0, refusal="memory")


def _count_batch(tasks: Sequence[Task | ServingError], call: Call) -> None:
    """Count a large batch as a call of its app, or of none if it has several. Raises ResourceExhausted."""
    if not call.is_large:
        return
    apps = {task.app for task in tasks if isinstance(task, Task)}
    _count_for(apps.pop() if len(apps) == 1 else "", call)


def task_of(request: serving_pb2.EvalRequest) -> Task:
    """Return the task of a typed request."""
    infer = evaluator_pb2.InferRequest(
        data=request.data, group=request.group or len(request.data) > 1, params_json=request.params_json
    )
    return Task(request.app, request.version, infer)


def write_response(result: EvalResult | ServingError) -> list[Buffer]:
    """Return the typed response of one eval, serialized, in parts."""
    if isinstance(result, ServingError):
        return [serving_pb2.EvalResponse(code=result.code, message=result.message).SerializeToString()]
    inferred = result.response
    response = serving_pb2.EvalResponse(message=inferred.message, version=result.version)
    if isinstance(inferred, LargeResponse):
        number = response.STREAM_FIELD_NUMBER if inferred.is_stream else response.RESULT_JSON_FIELD_NUMBER
        return [response.SerializeToString(), wire.field_head(number, len(inferred.result)), inferred.result]
    if inferred.WhichOneof("outcome") == "stream":
        response.stream = inferred.stream
    else:
        response.result_json = inferred.result_json
    return [response.SerializeToString()]


def error_metadata(error: ServingError, context: CallContext) -> list[tuple[str, str]]:
    """Return the trailing metadata of a failed call."""
    trailing = [("x-reqid", context.reqid), ("x-serving-code", str(error.code))]
    if error.version:
        trailing.append(("x-serving-version", error.version))
    if error.retry_after_s is not None:
        trailing.append(("retry-after", edge.retry_after(error)))
    trailing += edge.rate_limit(error)
    trailing += edge.challenge(error)
    _add_timing(trailing, context)
    return trailing


def _add_timing(headers: list[tuple[str, str]], context: CallContext) -> None:
    """Add what took how long to the headers of an answer, if its caller asks for it."""
    if context.record and context.record.is_timed:
        headers.append(("server-timing", context.record.timing(context.started)))


def _abort(call: Call, context: CallContext, error: ServingError) -> None:
    call.abort(grpc_status(error), error.message, error_metadata(error, context))


class EdgeService:
    """The REST interface, behind Envoy's transcoder.

    Requests come as gRPC. Every outcome is a plain HTTP response, which the transcoder passes on unchanged.
    """

    def __init__(self, dispatcher: Dispatcher, max_batch: int, held: HeldBytes, callers: Callers) -> None:
        self._dispatcher = dispatcher
        self._callers = callers
        self._max_batch = max_batch
        self._held = held

    def register(self, server: Server) -> None:
        """Answer the service's calls on a server."""
        server.unary("/atserving.v1.EdgeService/Eval", self.eval, self._full)
        server.unary("/atserving.v1.EdgeService/Batch", self.batch, self._full)

    def _full(self, call: Call) -> None:
        context, error = read_call(call, None, self._callers), _holds_too_much()
        self._dispatcher.rejected(context, error)
        _reply(call, context, edge.write_error(error))

    def eval(self, call: Call) -> None:
        # Envoy sends the deadline of no HTTP caller.
        context = read_call(call, None, self._callers, self._dispatcher.tracer)
        reply = partial(_reply, call, context)
        app = ""
        try:
            is_large = call.size >= LARGE_BYTES
            task = (_large_eval(call) if is_large else None) or _edge_eval(call)
            if is_large:
                app = task.app
                _count_for(app, call)
        except (GrpcError, TooMany) as error:
            _refuse_message(self._dispatcher, call, error)
            return
        except ServingError as error:
            self._dispatcher.rejected(context, error, app)
            reply(edge.write_error(error))
            return
        _begin(self._dispatcher, task, call, context, lambda result: reply(edge.write_answer(result)), _failing(reply))

    def batch(self, call: Call) -> None:
        context = read_call(call, None, self._callers, self._dispatcher.tracer, "batch")
        reply = partial(_reply, call, context)
        try:
            message = call.take_message()
            check_repeated(message, 0, _EXTENSIONS)
            request = parsed(httpbody_pb2.HttpBody(), message)
            tasks = edge.read_batch(request.content_type, request.data, self._max_batch)
            _count_batch(tasks, call)
        except (GrpcError, TooMany) as error:
            _refuse_message(self._dispatcher, call, error)
            return
        except ServingError as error:
            self._dispatcher.rejected(context, error)
            reply(edge.write_error(error))
            return
        work = _batch(self._dispatcher, tasks, context, self._held)
        _run(call, context, work, lambda results: reply(edge.write_batch(results, tasks)), _failing(reply))


def _refuse_message(dispatcher: Dispatcher, call: Call, error: GrpcError | TooMany) -> None:
    """Refuse a message that Envoy would not send."""
    dispatcher.counts.refused("", InvalidArgument.status, "malformed")
    if isinstance(error, GrpcError):
        call.abort(error.status, str(error))
    else:
        call.abort(StatusCode.INVALID_ARGUMENT, "the message has fields that no edge sends")


def _edge_eval(call: Call) -> Task:
    """Return the task of an eval. Raises a ServingError and GrpcError."""
    message = call.take_message()
    # The edge sends a body in a few fields, which are one message.
    check_repeated(message, _FEW, edge_pb2.EdgeEvalRequest.BODY_FIELD_NUMBER, (0, _EXTENSIONS))
    request = parsed(edge_pb2.EdgeEvalRequest(), message)
    return edge.read_eval(request.app, request.version, request.body.content_type, request.body.data)


def _large_eval(call: Call) -> Task | None:
    """Return the task of an eval whose body is large, without a copy of the resource; None for others.

    Raises a ServingError.
    """
    path = edge_pb2.EdgeEvalRequest.BODY_FIELD_NUMBER, httpbody_pb2.HttpBody.DATA_FIELD_NUMBER
    if (cut := _cut(call, path)) is None:
        return None
    request = parsed(edge_pb2.EdgeEvalRequest(), cut[0])
    if edge.is_bytes(request.body.content_type):
        return Task(request.app, request.version, evaluator_pb2.InferRequest(), Body(cut[1]))
    return edge.read_eval(request.app, request.version, request.body.content_type, b"".join(cut[1]))


def _large_typed_eval(call: Call) -> Task | None:
    """Return the task of a typed eval whose only resource is a large body, without a copy; None for others."""
    path = serving_pb2.EvalRequest.DATA_FIELD_NUMBER, serving_pb2.Resource.BODY_FIELD_NUMBER
    if (cut := _cut(call, path)) is None:
        return None
    request = parsed(serving_pb2.EvalRequest(), cut[0])
    if len(request.data) > 1 or request.group or request.params_json or request.data[0].attribute_json:
        return None
    return Task(request.app, request.version, evaluator_pb2.InferRequest(), Body(cut[1]))


def _cut(call: Call, path: tuple[int, int]) -> tuple[bytes, list[Buffer]] | None:
    """Cut a large body off the end of a call's message; return the rest as a message, and the body in parts."""
    first, *others = call.parts
    if (cut := cut_tail(first, call.size, path)) is None:
        return None
    small, offset = cut
    return small, [memoryview(first)[offset:], *others]


def _failing(reply: Callable[[edge.Reply], None]) -> Callable[[ServingError], None]:
    return lambda error: reply(edge.write_error(error))


def _reply(call: Call, context: CallContext, reply: edge.Reply) -> None:
    headers = [("content-type", reply.content_type), ("x-reqid", context.reqid), *reply.headers.items()]
    _add_timing(headers, context)
    call.respond(reply.status, headers, reply.body)
