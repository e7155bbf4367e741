"""The gRPC interface of an instance."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc

from atserving.v1 import evaluator_pb2, evaluator_pb2_grpc
from evaluator.serving.pipeline import Pipeline
from evaluator.serving.stream import GateStream

Context = grpc.aio.ServicerContext[evaluator_pb2.ExchangeRequest, evaluator_pb2.ExchangeResponse]


class EvaluatorServicer(evaluator_pb2_grpc.EvaluatorServiceServicer):
    """Passes calls to a pipeline; UNAVAILABLE until there is one."""

    def __init__(self) -> None:
        self.pipeline: Pipeline | None = None

    async def Exchange(  # type: ignore[override] # noqa: N802 - the interface names it; it writes through the context
        self, request_iterator: AsyncIterator[evaluator_pb2.ExchangeRequest], context: Context
    ) -> None:
        if self.pipeline is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the net is still being loaded")
        await GateStream(self.pipeline.answer).run(request_iterator, context.write)
