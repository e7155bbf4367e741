"""A request's way through an instance, as a straight line: a place, its resources, the net's preparation, a batch."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from atserving.errors import InvalidArgument
from evaluator import cpus
from evaluator.batcher import Batcher
from evaluator.resources import ResourceFetcher, Source
from evaluator.runner import NetRunner, Prepared, Result

_MAX_GROUP = 64


@dataclass(frozen=True)
class Input:
    """One resource of a request, with what its caller says of it (JSON; empty: nothing)."""

    source: Source
    attribute_json: str = ""


@dataclass(frozen=True)
class Task:
    """One request."""

    reqid: str
    inputs: tuple[Input, ...]
    group: bool = False
    params_json: str = ""
    deadline_s: float | None = None
    """Of the monotonic clock. Who calls enforces it; it is here for those who can't be cancelled."""


class Stages:
    """How long each stage of a request took, in milliseconds."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._began_s = time.perf_counter()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began_s)

    def add(self, name: str, seconds: float) -> None:
        self.ms[f"{name}_ms"] = round(seconds * 1000, 3)

    def end(self) -> None:
        self.add("total", time.perf_counter() - self._began_s)


class Pipeline:
    """Knows no transport. Every failure is a ServingError."""

    def __init__(self, runner: NetRunner, fetcher: ResourceFetcher, batcher: Batcher[Prepared, Result]) -> None:
        self._runner = runner
        self._fetcher = fetcher
        self._batcher = batcher
        # As many as can run; what waits for them is bounded by the batcher's places.
        self._decoders = ThreadPoolExecutor(cpus.available(), "decode")

    async def evaluate(self, task: Task, stages: Stages) -> Result:
        """The net's result. A cancelled call leaves at the next step; a forward pass that runs is finished."""
        with self._batcher.hold():
            prepared = await self._prepare(task, stages)
            try:
                answer = await self._batcher.submit(prepared)
            finally:
                prepared.release()
            stages.add("queue", answer.queue_s)
            stages.add("forward", answer.forward_s)
            return answer.value

    async def _prepare(self, task: Task, stages: Stages) -> Prepared:
        req = _request(task)
        with stages.timed("fetch"):
            for data, body in zip(req["data"], await self._fetch(task.inputs), strict=True):
                data["body"] = body
        if not task.group and len(task.inputs) == 1:
            req["data"] = req["data"][0]
        with stages.timed("decode"):
            return await asyncio.get_running_loop().run_in_executor(
                self._decoders, self._runner.prepare, task.reqid, req, task.deadline_s
            )

    async def _fetch(self, inputs: tuple[Input, ...]) -> list[bytes]:
        if len(inputs) == 1:
            return [await self._fetcher.fetch(inputs[0].source)]
        tasks = [asyncio.create_task(self._fetcher.fetch(each.source)) for each in inputs]
        try:
            return await asyncio.gather(*tasks)
        finally:
            # Where one failed, the others are of no use.
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """Ends the threads that decode, once they have nothing to do."""
        self._decoders.shutdown(wait=False, cancel_futures=True)


def _request(task: Task) -> dict[str, Any]:
    """The ``req`` of the net's functions, still without the resources' bytes, ``data`` always a list."""
    if not task.inputs:
        raise InvalidArgument("the request has no data")
    if len(task.inputs) > _MAX_GROUP:
        raise InvalidArgument(f"the request has {len(task.inputs)} resources, more than {_MAX_GROUP}")
    req: dict[str, Any] = {"data": [_data(each) for each in task.inputs]}
    if task.params_json:
        req["params"] = _json(task.params_json, "params")
    return req


def _data(given: Input) -> dict[str, Any]:
    data: dict[str, Any] = {"uri": ""}
    if given.attribute_json:
        data["attribute"] = _json(given.attribute_json, "attribute")
    return data


def _json(text: str, what: str) -> Any:
    """The value, with integers of any size; the gate has sent one document, but a direct caller might not."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise InvalidArgument(f"{what} is not JSON") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
