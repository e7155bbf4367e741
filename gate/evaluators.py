"""The way to an evaluator instance. Nothing outside this module knows how requests travel there."""

from __future__ import annotations

import grpc.aio

from atserving import transport
from atserving.config import Instance
from atserving.v1 import evaluator_pb2, evaluator_pb2_grpc

# How gRPC's core words a call that failed before there was a connection. Worded otherwise, a request counts as reached.
_NEVER_CONNECTED = "failed to connect to all addresses"


class TransportError(Exception):
    """The instance could not be reached, or was lost with the request on it (``reached``)."""

    def __init__(self, message: str, reached: bool) -> None:
        super().__init__(message)
        self.reached = reached


class EvaluatorConnection:
    """One instance, over one HTTP/2 connection that is opened at once and kept."""

    def __init__(self, instance: Instance) -> None:
        self._channel = transport.channel(instance.address)
        self._channel.get_state(try_to_connect=True)
        self._stub = evaluator_pb2_grpc.EvaluatorServiceStub(self._channel)

    async def infer(
        self, request: evaluator_pb2.InferRequest, timeout_s: float, traceparent: str | None
    ) -> evaluator_pb2.InferResponse:
        """Raises TransportError, and TimeoutError where the deadline passed. Cancelling it cancels the work there."""
        metadata = (("traceparent", traceparent),) if traceparent else None
        try:
            response: evaluator_pb2.InferResponse = await self._stub.Infer(
                request, timeout=timeout_s, metadata=metadata
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TimeoutError from None
            details = error.details() or error.code().name
            raise TransportError(details, reached=not details.startswith(_NEVER_CONNECTED)) from None
        return response

    async def close(self) -> None:
        """Closes at once; whatever is in flight is cancelled."""
        await self._channel.close(None)
