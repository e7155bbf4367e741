"""The gRPC interface of an instance, for those who ask it directly. Gates use links."""

from __future__ import annotations

import asyncio
import time

from grpc import StatusCode

from atserving import link
from atserving.grpc_call import Call, GrpcError, parsed
from atserving.grpc_server import Server
from atserving.v1 import evaluator_pb2
from evaluator.serving.pipeline import Pipeline, Request, fetches


class EvaluatorService:
    """Passes calls to a pipeline; UNAVAILABLE until there is one."""

    def __init__(self) -> None:
        self.pipeline: Pipeline | None = None

    def register(self, server: Server) -> None:
        """Answer the service's calls on a server."""
        server.unary("/atserving.v1.EvaluatorService/Infer", self._infer)

    def _infer(self, call: Call) -> None:
        if self.pipeline is None:
            call.abort(StatusCode.UNAVAILABLE, "the net is still being loaded")
            return
        try:
            request = parsed(evaluator_pb2.InferRequest(), call.message)
            deadline = call.deadline()
        except GrpcError as error:
            call.abort(error.status, str(error))
            return
        left_s = None if deadline is None else max(deadline - time.monotonic(), 1e-6)
        replier = _Replier(call)
        begun = self.pipeline.begin(
            link.Call(
                id=0,
                timeout_us=0 if left_s is None else max(1, int(left_s * 1e6)),
                # The caller has chosen this instance.
                flags=link.STAY | (link.FETCH if fetches(request) else 0),
                reqid=(call.header("x-reqid") or request.reqid).encode(),
                traceparent=(call.header("traceparent") or "").encode(),
                request=call.message,
            ),
            replier,
            # The call counts its bytes itself.
            held=0,
        )
        if not begun.ended:
            replier.request = begun
            call.on_gone = replier.gone
            if left_s is not None:
                replier.timer = asyncio.get_running_loop().call_later(left_s, begun.expire)


class _Replier:
    """Answers a gRPC call with the reply to it."""

    def __init__(self, call: Call) -> None:
        self.timer: asyncio.TimerHandle | None = None
        self.request: Request | None = None
        self._call = call

    def gone(self) -> None:
        """Abandon the request, since its caller has left."""
        if self.timer:
            self.timer.cancel()
        if self.request:
            self.request.abandon()

    def hold(self, count: int) -> bool:
        """Let each answer pass: these callers are few."""
        return True

    def reply(self, reply: link.Reply, held: int = 0) -> None:
        if self.timer:
            self.timer.cancel()
        self._call.finish(reply.response)
