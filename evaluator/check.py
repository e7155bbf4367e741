"""Tries a release without a mesh: loads it, runs it on images, says what it answers, how fast, in how much memory."""

from __future__ import annotations

import asyncio
import json
import math
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import orjson

from atserving.config import MalformedConfig, Release, validate
from atserving.errors import ServingError, StartError
from evaluator.contract import Req
from evaluator.loading import load
from evaluator.release import SCRIPT, fetch_release
from evaluator.runner import NetRunner, Prepared, Result

_TIMED_S = 1.0
_TIMED_RUNS = 20
_REQUEST_S = 60.0


@dataclass(frozen=True)
class Options:
    """What is checked, and with what. ``fields`` are those of the release's config; ``images`` may be empty."""

    tar: Path
    fields: Mapping[str, Any]
    images: Sequence[Path] = ()
    group: bool = False
    params: Any = None


@dataclass(frozen=True)
class Answer:
    """One request and the shape of what the net said to it."""

    request: str
    result: str


@dataclass(frozen=True)
class Report:
    """Times are medians in milliseconds a request, ``by_batch`` those of ``net_inference`` by the size of its batch."""

    net: str
    use_device: str
    batch_size: int
    load_s: float
    answers: list[Answer]
    prepare_ms: float
    by_batch_ms: dict[int, float]
    peak_memory_mib: int

    def to_json(self) -> str:
        return orjson.dumps(asdict(self), option=orjson.OPT_NON_STR_KEYS | orjson.OPT_INDENT_2).decode()

    def to_text(self) -> str:
        lines = [f"{self.net} on {self.use_device}, batch_size {self.batch_size}, loaded in {self.load_s:.2f} s"]
        lines += [f"{answer.request}: {answer.result}" for answer in self.answers]
        lines.append(f"prepare: {self.prepare_ms:.2f} ms a request")
        lines += [f"batch of {size}: {ms:.2f} ms a request" for size, ms in self.by_batch_ms.items()]
        return "\n".join([*lines, f"peak memory: {self.peak_memory_mib} MiB"])


async def check(options: Options) -> Report:
    """Raises StartError with the one line that says what is wrong with the release."""
    with tempfile.TemporaryDirectory(prefix="check-") as folder:
        release = _release(options)
        began_s = time.perf_counter()
        with ExitStack() as beside:
            cfg = (await fetch_release(release, Path(folder))).cfg()
            runner = await load(cfg, beside)
            load_s = time.perf_counter() - began_s
            script = SCRIPT in cfg["tar_files"]
            trial = await asyncio.to_thread(_Trial, runner, options, script)
            prepare_ms, by_batch_ms = await asyncio.to_thread(trial.timed)
        return Report(
            SCRIPT if script else str(cfg["custom_values"].get("net", "classify")),
            cfg["use_device"],
            runner.batch_size,
            round(load_s, 3),
            trial.answers,
            prepare_ms,
            by_batch_ms,
            _peak_memory_mib(script),
        )


def _release(options: Options) -> Release:
    fields = {"name": "check", "version": "v1", "file": options.tar.resolve().as_uri()}
    try:
        return validate(Release, {**options.fields, **fields})
    except MalformedConfig as error:
        raise StartError(f"the release is malformed: {error}") from None


class _Trial:
    """Requests to a loaded net: those that are given, or one made up."""

    def __init__(self, runner: NetRunner, options: Options, script: bool) -> None:
        """Asks each once. Raises StartError where one fails."""
        self._runner = runner
        self._params = options.params
        requests = _given(options) if options.images else self._made_up(options.group, script)
        self.answers = [Answer(name, self._shape(name, data)) for name, data in requests.items()]
        self._data = next(iter(requests.values()))

    def _made_up(self, group: bool, script: bool) -> dict[str, Any]:
        """One image, or a group of two where that is asked for, or is what a script answers."""
        picture = _data(_picture())
        one, two = {"a made-up image": picture}, {"a group of two made-up images": [picture, picture]}
        if group:
            return two
        if script and isinstance(self._outcome(picture), ServingError):
            return one if isinstance(self._outcome([picture, picture]), ServingError) else two
        return one

    def _shape(self, name: str, data: Any) -> str:
        outcome = self._outcome(data)
        if isinstance(outcome, ServingError):
            raise StartError(f"{name}: code {outcome.code}: {outcome.message}")
        if outcome.stream is not None:
            return f"a stream of {len(outcome.stream)} bytes"
        return shape(json.loads(outcome.json or b"null"))

    def timed(self) -> tuple[float, dict[int, float]]:
        """Milliseconds a request: preparing, and in batches by their size. Raises StartError where a batch fails."""
        batches: dict[int, float] = {}
        try:
            self._prepared(self._data, 1)[0].release()
            prepare_ms = _median_ms(lambda: self._prepared(self._data, 1)[0].release())
            for size in sorted({1, self._runner.batch_size}):
                batches[size] = self._batch_ms(size)
        except ServingError as error:
            raise StartError(f"a batch failed: code {error.code}: {error.message}") from None
        return prepare_ms, batches

    def _batch_ms(self, size: int) -> float:
        batch = self._prepared(self._data, size)

        def run() -> None:
            for outcome in self._runner.infer(batch):
                if isinstance(outcome, ServingError):
                    raise outcome

        try:
            run()
            return round(_median_ms(run) / size, 3)
        finally:
            for prepared in batch:
                prepared.release()

    def _outcome(self, data: Any) -> Result | ServingError:
        try:
            (prepared,) = self._prepared(data, 1)
            try:
                return self._runner.infer([prepared])[0]
            finally:
                prepared.release()
        except ServingError as error:
            return error

    def _prepared(self, data: Any, size: int) -> list[Prepared]:
        return [self._runner.prepare("check", self._request(data), time.monotonic() + _REQUEST_S) for _ in range(size)]

    def _request(self, data: Any) -> Req:
        copy = [dict(each) for each in data] if isinstance(data, list) else dict(data)
        return {"data": copy} if self._params is None else {"data": copy, "params": self._params}


def _given(options: Options) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for path in options.images:
        try:
            data[path.name] = _data(path.read_bytes())
        except OSError as error:
            raise StartError(f"{path}: {error.strerror}") from None
    return {", ".join(data) + ", a group": list(data.values())} if options.group else data


def _data(body: bytes) -> dict[str, Any]:
    return {"uri": "", "body": body}


def _picture() -> bytes:
    """640x480, with some structure: colours that run into each other, and a bright disc."""
    y, x = np.mgrid[0:480, 0:640]
    pixels = np.stack([x * 255 // 640, y * 255 // 480, (x + y) * 255 // 1120], axis=-1).astype(np.uint8)
    return cv2.imencode(".jpg", cv2.circle(pixels, (320, 240), 120, (255, 255, 255), -1))[1].tobytes()


def _median_ms(run: Callable[[], None]) -> float:
    times_s: list[float] = []
    until_s = time.perf_counter() + _TIMED_S
    while len(times_s) < _TIMED_RUNS and (not times_s or time.perf_counter() < until_s):
        began_s = time.perf_counter()
        run()
        times_s.append(time.perf_counter() - began_s)
    return round(statistics.median(times_s) * 1000, 3)


def _peak_memory_mib(script: bool) -> int:
    """Of this process, or of the script's, once that has ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN if script else resource.RUSAGE_SELF)
    return math.ceil(usage.ru_maxrss / 1024)


def shape(value: Any) -> str:
    """The types in a JSON value, an array's by its first item: ``{"a": [3 x number]}``."""
    match value:
        case dict():
            return "{" + ", ".join(f"{json.dumps(name)}: {shape(each)}" for name, each in value.items()) + "}"
        case []:
            return "[]"
        case list():
            return f"[{len(value)} x {shape(value[0])}]"
        case None:
            return "null"
        case str():
            return "text"
        case bool():
            return "boolean"
        case _:
            return "integer" if isinstance(value, int) else "number"
