"""The gRPC interface of an instance, for those who ask it directly. Gates use links."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from grpc import StatusCode

from atserving import __version__, link
from atserving.grpc_call import Call, GrpcError, parsed
from atserving.grpc_server import Server
from atserving.telemetry import trace_context
from atserving.v1 import evaluator_pb2
from evaluator.serving.pipeline import Pipeline, Request, fetches


class EvaluatorService:
    """Passes calls to a pipeline; UNAVAILABLE until there is one."""

    def __init__(self) -> None:
        self.pipeline: Pipeline | None = None
        self._id = ""
        self._is_away: Callable[[], bool] = lambda: False

    def serve(self, id_: str, pipeline: Pipeline, is_away: Callable[[], bool]) -> None:
        """Answer calls by a pipeline. ``is_away`` tells whether the worker serves."""
        self.pipeline, self._id, self._is_away = pipeline, id_, is_away

    def register(self, server: Server) -> None:
        """Answer the service's calls on a server."""
        server.unary("/atserving.v1.EvaluatorService/Infer", self._infer)
        server.unary("/atserving.v1.EvaluatorService/GetLoad", self._load)

    def _load(self, call: Call) -> None:
        try:
            wanted = parsed(evaluator_pb2.GetLoadRequest(), call.message).id
        except GrpcError as error:
            call.abort(error.status, str(error))
            return
        if self.pipeline is None or wanted not in ("", self._id):
            call.abort(StatusCode.NOT_FOUND, f"this is not instance {wanted[:80]!r}")
            return
        capacity = self.pipeline.capacity
        load = evaluator_pb2.Load(
            in_flight=capacity.in_flight, fetching=capacity.fetching, away=self._is_away(), software=__version__
        )
        call.finish(load.SerializeToString())

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
                traceparent=(trace_context(call.header("traceparent")) or "").encode(),
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
