"""A request's way through an instance, as a straight line: a place, its resources, the worker."""

from __future__ import annotations

import asyncio
import time

from atserving.errors import InvalidArgument, ServingError
from atserving.v1 import evaluator_pb2, serving_pb2
from evaluator.fetching.resources import ResourceFetcher
from evaluator.limits import Budget, Limits
from evaluator.serving.capacity import Capacity
from evaluator.serving.supervisor import WorkerSupervisor

_MAX_GROUP = 64


class Stages:
    """How long each stage of a request took, in milliseconds."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._began_s = time.perf_counter()

    def add(self, name: str, seconds: float) -> None:
        self.ms[f"{name}_ms"] = round(seconds * 1000, 3)

    def of_worker(self, stages: evaluator_pb2.Stages) -> None:
        """What the worker measured: all of it for a request that ran, less for one that did not come so far."""
        self.ms["decode_ms"] = stages.decode_us / 1000
        if stages.batch_size:
            self.ms["queue_ms"] = stages.queue_us / 1000
            self.ms["forward_ms"] = stages.forward_us / 1000
            self.ms["postprocess_ms"] = stages.postprocess_us / 1000

    def end(self) -> None:
        self.add("total", time.perf_counter() - self._began_s)


class Pipeline:
    """Knows no transport. Every failure is a ServingError."""

    def __init__(
        self,
        worker: WorkerSupervisor,
        fetcher: ResourceFetcher,
        capacity: Capacity,
        limits: Limits,
        built_in: str | None,
    ) -> None:
        """``built_in``: the net's name, if it is a built-in one, all of which take one image; None: a script."""
        self._worker = worker
        self._fetcher = fetcher
        self._capacity = capacity
        self._limits = limits
        self._built_in = built_in

    async def evaluate(self, call: evaluator_pb2.Call, stages: Stages) -> evaluator_pb2.InferResponse:
        """The net's result. A cancelled call leaves at the next step; a forward pass that runs is finished."""
        with self._capacity.hold():
            began_s = time.perf_counter()
            await self._fetch(call.request)
            stages.add("fetch", time.perf_counter() - began_s)
            reply = await self._worker.infer(call)
            stages.of_worker(reply.stages)
            if reply.response.HasField("error"):
                raise ServingError.from_proto(reply.response.error)
            return reply.response

    async def _fetch(self, request: evaluator_pb2.InferRequest) -> None:
        """Replaces what each resource names by its bytes. Raises ServingError."""
        if not request.data:
            raise InvalidArgument("the request has no data")
        if len(request.data) > _MAX_GROUP:
            raise InvalidArgument(f"the request has {len(request.data)} resources, more than {_MAX_GROUP}")
        if self._built_in and (request.group or len(request.data) > 1):
            # The net would say so too, but only once everything has been fetched.
            raise InvalidArgument(f"{self._built_in} takes one image, not a list of them")
        sources = [each.WhichOneof("source") for each in request.data]
        if None in sources:
            raise InvalidArgument("the request's data has neither a uri nor a body")
        # What is here already is checked where it is read, and not copied out of the message for that.
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
            # Where one failed, the others are of no use.
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
