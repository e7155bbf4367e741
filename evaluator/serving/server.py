"""The gRPC face of an instance: translates, calls the pipeline, translates back, and writes one log line a request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import grpc
import structlog

from atserving.errors import DeadlineExceeded, Internal, ServingError
from atserving.telemetry import request_id
from atserving.v1 import evaluator_pb2, evaluator_pb2_grpc
from evaluator.serving.metrics import Metrics
from evaluator.serving.pipeline import Pipeline, Stages
from evaluator.serving.stream import GateStream

log = structlog.get_logger()

_CALLER_GONE = 499

Context = grpc.aio.ServicerContext[evaluator_pb2.ExchangeRequest, evaluator_pb2.ExchangeResponse]


class EvaluatorServicer(evaluator_pb2_grpc.EvaluatorServiceServicer):
    """Calls of a pipeline, once there is one."""

    def __init__(self, metrics: Metrics, app: str, version: str) -> None:
        self.pipeline: Pipeline | None = None
        self._metrics = metrics
        self._log = log.bind(app=app, version=version)

    async def Exchange(  # type: ignore[override] # noqa: N802 - named by the interface; it writes by the context
        self, request_iterator: AsyncIterator[evaluator_pb2.ExchangeRequest], context: Context
    ) -> None:
        if self.pipeline is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the net is still being loaded")
        await GateStream(partial(self._infer, self.pipeline)).run(request_iterator, context.write)

    async def _infer(self, pipeline: Pipeline, call: evaluator_pb2.Call) -> evaluator_pb2.InferResponse:
        request = call.request
        request.reqid = reqid = request_id(request.reqid)
        stages = Stages()
        code = status = _CALLER_GONE
        error: ServingError | None = None
        try:
            async with asyncio.timeout(call.timeout_us / 1e6 if call.timeout_us else None):
                response = await pipeline.evaluate(call, stages)
            code, status = 0, 200
            return response
        except TimeoutError:
            error = DeadlineExceeded("the deadline passed")
        except ServingError as failure:
            error = failure
        except Exception:
            self._log.exception("a request failed unexpectedly", reqid=reqid)
            error = Internal("the evaluator failed")
        finally:
            stages.end()
            if error:
                code, status = error.code, error.status
            self._metrics.observe(status, stages.ms)
            self._log.info("request", reqid=reqid, code=code, **_reason(error), **stages.ms, **_trace(call.traceparent))
        return evaluator_pb2.InferResponse(error=error.to_proto())


def _reason(error: ServingError | None) -> dict[str, str]:
    return {"reason": error.message} if error else {}


def _trace(traceparent: str) -> dict[str, str]:
    return {"traceparent": traceparent[:64]} if traceparent else {}
