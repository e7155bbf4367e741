"""The gate's gRPC services: translate, call, translate back."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import grpc.aio
import structlog
from google.api import httpbody_pb2

from atserving.errors import Internal, ServingError
from atserving.grpc_status import grpc_status
from atserving.telemetry import request_id, trace_context
from atserving.v1 import edge_pb2, edge_pb2_grpc, evaluator_pb2, serving_pb2, serving_pb2_grpc
from gate import edge
from gate.admission import Caller
from gate.batch import run_batch
from gate.dispatch import CallContext, Dispatcher, EvalResult, Task

log = structlog.get_logger()

BATCH_CONCURRENCY = 16
"""How many items of a batch run at once."""

_RequestT = TypeVar("_RequestT")
_ResponseT = TypeVar("_ResponseT")
Context = grpc.aio.ServicerContext[_RequestT, _ResponseT]


def read_call(context: Context[_RequestT, _ResponseT]) -> CallContext:
    """Read a call's metadata and deadline."""
    metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    remaining_s = context.time_remaining()
    now = time.monotonic()
    return CallContext(
        reqid=request_id(metadata.get("x-reqid")),
        caller=Caller(),
        traceparent=trace_context(metadata.get("traceparent")),
        deadline=None if remaining_s is None else now + remaining_s,
        started=now,
    )


@contextmanager
def _rejections_logged(call: CallContext) -> Iterator[None]:
    """Log a request that is rejected before it becomes an eval. The dispatcher logs evals."""
    try:
        yield
    except ServingError as error:
        log.info(
            "request rejected", reqid=call.reqid, code=error.code, reason=error.message, traceparent=call.traceparent
        )
        raise


class ServingServicer(serving_pb2_grpc.ServingServiceServicer):
    """The typed interface."""

    def __init__(self, dispatcher: Dispatcher, max_batch: int) -> None:
        self._dispatcher = dispatcher
        self._max_batch = max_batch

    async def Eval(  # noqa: N802
        self,
        request: serving_pb2.EvalRequest,
        context: Context[serving_pb2.EvalRequest, serving_pb2.EvalResponse],
    ) -> serving_pb2.EvalResponse:
        call = read_call(context)
        try:
            answer = await self._dispatcher.eval(_task(request), call)
        except ServingError as error:
            await _abort(error, call, context)
        await context.send_initial_metadata((("x-reqid", call.reqid), ("x-serving-version", answer.version)))
        return _response(answer)

    async def Batch(  # noqa: N802
        self,
        request: serving_pb2.BatchRequest,
        context: Context[serving_pb2.BatchRequest, serving_pb2.BatchResponse],
    ) -> serving_pb2.BatchResponse:
        call = read_call(context)
        try:
            with _rejections_logged(call):
                edge.check_batch(len(request.tasks), self._max_batch)
        except ServingError as error:
            await _abort(error, call, context)
        tasks = [_task(each) for each in request.tasks]
        results = await run_batch(self._dispatcher, tasks, call, BATCH_CONCURRENCY)
        await context.send_initial_metadata((("x-reqid", call.reqid),))
        return serving_pb2.BatchResponse(results=[_response(each) for each in results])


def _task(request: serving_pb2.EvalRequest) -> Task:
    infer = evaluator_pb2.InferRequest(
        data=request.data, group=request.group or len(request.data) > 1, params_json=request.params_json
    )
    return Task(request.app, request.version, infer)


def _response(result: EvalResult | ServingError) -> serving_pb2.EvalResponse:
    if isinstance(result, ServingError):
        return serving_pb2.EvalResponse(code=result.code, message=result.message)
    inferred = result.response
    response = serving_pb2.EvalResponse(message=inferred.message, version=result.version)
    if inferred.WhichOneof("outcome") == "stream":
        response.stream = inferred.stream
    else:
        response.result_json = inferred.result_json
    return response


async def _abort(error: ServingError, call: CallContext, context: Context[_RequestT, _ResponseT]) -> NoReturn:
    """End the call before any metadata is sent, so that all of it travels as one header frame (Trailers-Only)."""
    trailing = [("x-reqid", call.reqid), ("x-serving-code", str(error.code))]
    if error.retry_after_s is not None:
        trailing.append(("retry-after", edge.retry_after(error)))
    await context.abort(grpc_status(error), error.message, tuple(trailing))


class EdgeServicer(edge_pb2_grpc.EdgeServiceServicer):
    """The REST interface, behind Envoy's transcoder. Every outcome is a reply with its HTTP status in a header."""

    def __init__(self, dispatcher: Dispatcher, max_batch: int) -> None:
        self._dispatcher = dispatcher
        self._max_batch = max_batch

    async def Eval(  # noqa: N802
        self,
        request: edge_pb2.EdgeEvalRequest,
        context: Context[edge_pb2.EdgeEvalRequest, httpbody_pb2.HttpBody],
    ) -> httpbody_pb2.HttpBody:
        call = read_call(context)
        return await _reply(self._eval(request, call), call, context)

    async def Batch(  # noqa: N802
        self,
        request: httpbody_pb2.HttpBody,
        context: Context[httpbody_pb2.HttpBody, httpbody_pb2.HttpBody],
    ) -> httpbody_pb2.HttpBody:
        call = read_call(context)
        return await _reply(self._batch(request, call), call, context)

    async def _eval(self, request: edge_pb2.EdgeEvalRequest, call: CallContext) -> edge.Reply:
        with _rejections_logged(call):
            task = edge.read_eval(request.app, request.version, request.body.content_type, request.body.data)
        return edge.write_answer(await self._dispatcher.eval(task, call))

    async def _batch(self, request: httpbody_pb2.HttpBody, call: CallContext) -> edge.Reply:
        with _rejections_logged(call):
            tasks = edge.read_batch(request.content_type, request.data, self._max_batch)
        return edge.write_batch(await run_batch(self._dispatcher, tasks, call, BATCH_CONCURRENCY))


async def _reply(
    work: Awaitable[edge.Reply],
    call: CallContext,
    context: Context[_RequestT, httpbody_pb2.HttpBody],
) -> httpbody_pb2.HttpBody:
    try:
        reply = await work
    except ServingError as error:
        reply = edge.write_error(error)
    except Exception:
        log.exception("request failed", reqid=call.reqid)
        reply = edge.write_error(Internal("the gate failed on this request"))
    # Trailing metadata makes the whole reply one write: a process that dies earlier has sent nothing of it.
    context.set_trailing_metadata((("x-serving-status", str(reply.status)), *reply.headers.items()))
    return httpbody_pb2.HttpBody(content_type=reply.content_type, data=reply.body)
