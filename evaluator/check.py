"""Checks a release without a mesh: loads it, runs it on images, and reports its results, speed and memory."""

from __future__ import annotations

import asyncio
import json
import math
import resource
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np

from atserving import lifecycle, link
from atserving.cli import results
from atserving.config import MalformedConfig, Release, validate
from atserving.errors import DeadlineExceeded, ServingError, StartError
from atserving.v1 import evaluator_pb2, serving_pb2
from evaluator.fetching.release import fetch_release
from evaluator.sandbox.decision import SandboxSettings
from evaluator.serving.supervisor import WorkerSupervisor
from evaluator.serving.workspace import workspace
from evaluator.worker.plan import Plan

_TIMED_S = 1.0
_TIMED_RUNS = 20
_REQUEST_S = 60.0


@dataclass(frozen=True)
class CheckOptions:
    """The release to check, and the images for it. ``fields`` are the fields of its config; ``images`` may be empty."""

    tar: Path
    fields: Mapping[str, Any]
    images: Sequence[Path] = ()
    group: bool = False
    params: Any = None
    network: bool = False
    """Whether a script that asks for the network gets it."""


@dataclass(frozen=True)
class RequestReport:
    """One request and its result: a JSON value, or bytes for a stream."""

    request: str
    result: Any


@dataclass(frozen=True)
class Report:
    """The outcome. Times are medians in milliseconds per request; ``by_batch_ms`` is the inference, by batch size."""

    net: str
    use_device: str
    plan: Plan
    load_s: float
    answers: list[RequestReport]
    prepare_ms: float
    by_batch_ms: dict[int, float]
    peak_memory_mib: int

    def to_json(self) -> str:
        answers = [{"request": each.request, "result": results.as_json(each.result)} for each in self.answers]
        return results.dumps({**asdict(self), "answers": answers}, indent=2)

    def to_text(self) -> str:
        plan = self.plan
        lines = [
            f"{self.net} on {self.use_device}, loaded in {self.load_s:.2f} s",
            f"batch size {plan.batch_size}, engines: {plan.engines}, threads each: {plan.threads or 'its own choice'}",
        ]
        for answer in self.answers:
            lines += [f"{answer.request}:", *(f"  {line}" for line in results.lines(answer.result))]
        lines.append(f"prepare: {self.prepare_ms:.2f} ms a request")
        lines += [f"batch of {size}: {ms:.2f} ms a request" for size, ms in self.by_batch_ms.items()]
        return "\n".join([*lines, f"peak memory: {self.peak_memory_mib} MiB"])


async def check(options: CheckOptions) -> Report:
    """Check a release. Raises StartError with one line that says what is wrong with it."""
    with workspace(None, "check") as folder:
        release = _release(options)
        began_s = time.perf_counter()
        config = await fetch_release(release, folder)
        worker = WorkerSupervisor(config, sandbox=SandboxSettings(network=options.network))
        try:
            await worker.start()
            load_s = time.perf_counter() - began_s
            running = asyncio.create_task(worker.run())
            try:
                trial = _Trial(worker, options)
                data = await trial.ask_each(config.script is not None)
                prepare_ms, by_batch_ms = await trial.timed(data)
            finally:
                await lifecycle.end([running])
        finally:
            await worker.close()
    return Report(
        config.net,
        config.use_device,
        worker.plan,
        round(load_s, 3),
        trial.answers,
        prepare_ms,
        by_batch_ms,
        math.ceil(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
    )


def _release(options: CheckOptions) -> Release:
    fields = {"name": "check", "version": "v1", "file": options.tar.resolve().as_uri()}
    try:
        return validate(Release, {**options.fields, **fields})
    except MalformedConfig as error:
        raise StartError(f"the release is malformed: {error}") from None


class _Trial:
    """Sends requests to a loaded net: the given images, or a made-up one."""

    def __init__(self, worker: WorkerSupervisor, options: CheckOptions) -> None:
        self.answers: list[RequestReport] = []
        self._worker = worker
        self._options = options

    async def ask_each(self, script: bool) -> list[bytes]:
        """Send each request once, and return the first one's images. Raises StartError if one fails."""
        options = self._options
        requests = _given(options) if options.images else await self._made_up(options.group, script)
        for name, images in requests.items():
            self.answers.append(RequestReport(name, await self._result(name, images)))
        return next(iter(requests.values()))

    async def _made_up(self, group: bool, script: bool) -> dict[str, list[bytes]]:
        """Return one image, or a group of two if the options or the script want a group."""
        picture = _picture()
        one, two = {"a made-up image": [picture]}, {"a group of two made-up images": [picture, picture]}
        if group:
            return two
        if script and not await self._answers(one) and await self._answers(two):
            return two
        return one

    async def _answers(self, requests: dict[str, list[bytes]]) -> bool:
        try:
            await self._ask(*requests.values())
        except ServingError:
            return False
        return True

    async def _result(self, name: str, images: list[bytes]) -> Any:
        try:
            response = (await self._ask(images))[1]
        except ServingError as error:
            raise StartError(f"{name}: code {error.code}: {error.message}") from None
        if response.WhichOneof("outcome") == "stream":
            return response.stream
        return json.loads(response.result_json)

    async def timed(self, images: list[bytes]) -> tuple[float, dict[int, float]]:
        """Measure the milliseconds per request: preparation, and inference by batch size. Raises StartError."""
        prepare_ms: list[float] = []
        batches: dict[int, float] = {}
        try:
            for size in sorted({1, self._worker.plan.batch_size}):
                stages = [each async for each in self._rounds(images, size)]
                prepare_ms += [each.decode_us / 1000 for each in stages]
                batches[size] = _median_ms([(each.forward_us + each.postprocess_us) / size for each in stages])
        except ServingError as error:
            raise StartError(f"a batch failed: code {error.code}: {error.message}") from None
        return round(statistics.median(prepare_ms), 3), batches

    async def _rounds(self, images: list[bytes], size: int) -> AsyncIterator[link.Reply]:
        """Run batches of ``size``, and yield the stages of one request of each."""
        self._worker.configure(delay_s=0 if size == 1 else _REQUEST_S)
        until_s = time.perf_counter() + _TIMED_S
        for number in range(_TIMED_RUNS):
            if number and time.perf_counter() > until_s:
                return
            replies = await asyncio.gather(*(self._ask(images) for _ in range(size)))
            if replies[0][0].batch_size != size:
                raise StartError(f"a batch of {size} requests failed, though each alone does not, see the log")
            yield replies[0][0]

    async def _ask(self, images: list[bytes]) -> tuple[link.Reply, evaluator_pb2.InferResponse]:
        request = evaluator_pb2.InferRequest(
            data=[serving_pb2.Resource(body=body) for body in images],
            group=self._options.group or len(images) > 1,
            params_json="" if self._options.params is None else json.dumps(self._options.params),
            reqid="check",
        )
        try:
            async with asyncio.timeout(_REQUEST_S):
                reply = await self._worker.infer(request, _REQUEST_S)
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {_REQUEST_S:g} s") from None
        response = evaluator_pb2.InferResponse.FromString(cast(bytes, reply.response))
        if response.HasField("error"):
            raise ServingError.from_proto(response.error)
        return reply, response


def _given(options: CheckOptions) -> dict[str, list[bytes]]:
    images: dict[str, list[bytes]] = {}
    for path in options.images:
        try:
            images[path.name if path.name not in images else str(path)] = [path.read_bytes()]
        except OSError as error:
            raise StartError(f"{path}: {error.strerror}") from None
    return {", ".join(images) + ", a group": [body for (body,) in images.values()]} if options.group else images


def _picture() -> bytes:
    """Return a JPEG of 640x480 with colour gradients and a bright disc."""
    y, x = np.mgrid[0:480, 0:640]
    pixels = np.stack([x * 255 // 640, y * 255 // 480, (x + y) * 255 // 1120], axis=-1).astype(np.uint8)
    return cv2.imencode(".jpg", cv2.circle(pixels, (320, 240), 120, (255, 255, 255), -1))[1].tobytes()


def _median_ms(microseconds: Sequence[float]) -> float:
    return round(statistics.median(microseconds) / 1000, 3)
