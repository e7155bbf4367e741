"""The path of one request through an instance: admission, its resources, the worker; its deadline, metrics and log."""

from __future__ import annotations

import asyncio
import time

import structlog

from atserving.errors import DeadlineExceeded, Internal, InvalidArgument, ServingError
from atserving.telemetry import request_id
from atserving.v1 import evaluator_pb2, serving_pb2
from evaluator.fetching.resources import ResourceFetcher
from evaluator.limits import Budget, Limits
from evaluator.net_config import NetConfig
from evaluator.serving.capacity import Capacity
from evaluator.serving.metrics import Metrics
from evaluator.serving.supervisor import WorkerSupervisor

log = structlog.get_logger()

_MAX_GROUP = 64
_CALLER_GONE = 499


class Stages:
    """The duration of each stage of a request, in milliseconds."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._began_s = time.perf_counter()

    def add(self, name: str, seconds: float) -> None:
        self.ms[f"{name}_ms"] = round(seconds * 1000, 3)

    def add_worker(self, stages: evaluator_pb2.Stages) -> None:
        """Add the worker's stages: all of them if the request ran, else only the decoding."""
        self.ms["decode_ms"] = stages.decode_us / 1000
        if stages.batch_size:
            self.ms["queue_ms"] = stages.queue_us / 1000
            self.ms["forward_ms"] = stages.forward_us / 1000
            self.ms["postprocess_ms"] = stages.postprocess_us / 1000

    def end(self) -> None:
        self.add("total", time.perf_counter() - self._began_s)


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
    ) -> None:
        self._worker = worker
        self._fetcher = fetcher
        self._capacity = capacity
        self._metrics = metrics
        self._limits: Limits = config.limits
        # Built-in nets take one image; a script may take groups.
        self._built_in = None if config.script else config.net
        self._log = log.bind(app=app, version=version)

    async def answer(self, call: evaluator_pb2.Call) -> evaluator_pb2.InferResponse:
        """Return the net's result, or the error that the request ended with; count and log it.

        A cancelled call stops at its next step, but a forward pass that has begun finishes.
        """
        reqid = call.request.reqid = request_id(call.request.reqid)
        stages = Stages()
        code = status = _CALLER_GONE
        error: ServingError | None = None
        try:
            async with asyncio.timeout(call.timeout_us / 1e6 if call.timeout_us else None):
                response = await self._evaluate(call, stages)
            code, status = 0, 200
            return response
        except TimeoutError:
            error = DeadlineExceeded("the deadline passed")
        except ServingError as failure:
            error = failure
        except Exception:
            self._log.exception("request failed", reqid=reqid)
            error = Internal("the evaluator failed")
        finally:
            stages.end()
            if error:
                code, status = error.code, error.status
            self._metrics.observe(status, stages.ms)
            reason = {"reason": error.message} if error else {}
            trace = {"traceparent": call.traceparent[:64]} if call.traceparent else {}
            self._log.info("request finished", reqid=reqid, code=code, **reason, **stages.ms, **trace)
        return evaluator_pb2.InferResponse(error=error.to_proto())

    async def _evaluate(self, call: evaluator_pb2.Call, stages: Stages) -> evaluator_pb2.InferResponse:
        with self._capacity.hold():
            began_s = time.perf_counter()
            await self._fetch(call.request)
            stages.add("fetch", time.perf_counter() - began_s)
            reply = await self._worker.infer(call)
            stages.add_worker(reply.stages)
            if reply.response.HasField("error"):
                raise ServingError.from_proto(reply.response.error)
            return reply.response

    async def _fetch(self, request: evaluator_pb2.InferRequest) -> None:
        """Replace each resource's URI by its bytes. Raises a ServingError."""
        if not request.data:
            raise InvalidArgument("the request has no data")
        if len(request.data) > _MAX_GROUP:
            raise InvalidArgument(f"the request has {len(request.data)} resources, more than {_MAX_GROUP}")
        if self._built_in and (request.group or len(request.data) > 1):
            # The net would refuse it too, but only after the download.
            raise InvalidArgument(f"{self._built_in} takes one image, not a list of them")
        sources = [each.WhichOneof("source") for each in request.data]
        if None in sources:
            raise InvalidArgument("the request's data has neither a uri nor a body")
        # The worker checks the sizes of bodies, so the front need not copy them out of the message.
        elsewhere = [each for each, source in zip(request.data, sources, strict=True) if source == "uri"]
        budget = Budget(self._limits.max_request_bytes)
        if len(elsewhere) == 1:
            elsewhere[0].body = await self._fetcher.fetch(elsewhere[0].uri, budget)
        elif elsewhere:
            await self._fetch_all(elsewhere, budget)

    async def _fetch_all(self, resources: list[serving_pb2.Resource], budget: Budget) -> None:
        tasks = [asyncio.create_task(self._fetcher.fetch(each.uri, budget)) for each in resources]
        try:
            for resource, body in zip(resources, await asyncio.gather(*tasks), strict=True):
                resource.body = body
        finally:
            # If one failed, the others are of no use.
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
