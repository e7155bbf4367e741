"""The gRPC face of an instance: translates, calls the pipeline, translates back, and writes one log line a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import structlog

from atserving.errors import DeadlineExceeded, Internal, ServingError
from atserving.telemetry import request_id
from atserving.v1 import evaluator_pb2, evaluator_pb2_grpc, serving_pb2
from evaluator.exchange import Exchange
from evaluator.pipeline import Input, Pipeline, Stages, Task
from evaluator.resources import Source
from evaluator.runner import Result

log = structlog.get_logger()

_CALLER_GONE = 499

Context = grpc.aio.ServicerContext[evaluator_pb2.ExchangeRequest, evaluator_pb2.ExchangeResponse]


class EvaluatorServicer(evaluator_pb2_grpc.EvaluatorServiceServicer):
    """Calls of a pipeline."""

    def __init__(self, pipeline: Pipeline, app: str, version: str) -> None:
        self._pipeline = pipeline
        self._log = log.bind(app=app, version=version)

    async def Exchange(  # type: ignore[override] # noqa: N802 - named by the interface; it writes by the context
        self, request_iterator: AsyncIterator[evaluator_pb2.ExchangeRequest], context: Context
    ) -> None:
        await Exchange(self._infer).run(request_iterator, context.write)

    async def _infer(self, call: evaluator_pb2.Call) -> evaluator_pb2.InferResponse:
        request = call.request
        reqid = request_id(request.reqid)
        structlog.contextvars.bind_contextvars(reqid=reqid)
        stages = Stages()
        code = _CALLER_GONE
        error: ServingError | None = None
        try:
            async with asyncio.timeout(call.timeout_us / 1e6 if call.timeout_us else None):
                result = await self._pipeline.evaluate(_task(call, reqid), stages)
            code = 0
            return _response(result)
        except TimeoutError:
            error = DeadlineExceeded("the deadline passed")
        except ServingError as failure:
            error = failure
        except Exception:
            self._log.exception("a request failed unexpectedly")
            error = Internal("the evaluator failed")
        finally:
            stages.end()
            self._log.info(
                "request", code=error.code if error else code, **_reason(error), **stages.ms, **_trace(call.traceparent)
            )
        return evaluator_pb2.InferResponse(error=error.to_proto())


def _task(call: evaluator_pb2.Call, reqid: str) -> Task:
    request = call.request
    deadline_s = time.monotonic() + call.timeout_us / 1e6 if call.timeout_us else None
    return Task(reqid, tuple(_input(each) for each in request.data), request.group, request.params_json, deadline_s)


def _input(resource: serving_pb2.Resource) -> Input:
    match resource.WhichOneof("source"):
        case "body":
            source = Source(body=resource.body)
        case "uri":
            source = Source(uri=resource.uri)
        case _:
            source = Source()
    return Input(source, resource.attribute_json)


def _response(result: Result) -> evaluator_pb2.InferResponse:
    if result.stream is not None:
        return evaluator_pb2.InferResponse(stream=result.stream, message=result.message)
    return evaluator_pb2.InferResponse(result_json=(result.json or b"null").decode(), message=result.message)


def _reason(error: ServingError | None) -> dict[str, str]:
    return {"reason": error.message} if error else {}


def _trace(traceparent: str) -> dict[str, str]:
    return {"traceparent": traceparent[:64]} if traceparent else {}
