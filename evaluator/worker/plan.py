"""How a net runs on the hardware there is: how many engines, with how many threads each, and how large a batch may be.

On a CPU that is measured when the net is loaded, where the release does not say it: what takes the least CPU time a
request, which is what bounds a machine that is fully used, and tells the same on one that is busy with other things.
On a GPU there is one engine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog

from atserving.errors import ServingError, StartError
from evaluator import cpus
from evaluator.contract import Config, NetFunctions, Req
from evaluator.images import sample
from evaluator.requests import Files
from evaluator.runner import Prepared, Result, Runner
from evaluator.values import Values
from evaluator.worker.progress import MAX_THREADS

log = structlog.get_logger()

_MAX_MEASURED_BATCH_SIZE = 32
_MEASURE_S = 0.04
# Of two that cost about the same, the smaller batch and the fewer engines: less latency.
_WORTH = 1.05


@dataclass(frozen=True)
class Plan:
    """``engines`` batches run at a time, each with ``threads`` threads of onnxruntime (0: as onnxruntime likes)."""

    engines: int
    threads: int
    batch_size: int
    preparers: int = 0
    """Threads that only prepare requests; 0 where each engine prepares its own."""
    measured: dict[str, float] = field(default_factory=dict)
    """Milliseconds of CPU a request, without decoding, by ``<engines>x<threads> batch <size>``; empty: none was."""

    @property
    def lanes(self) -> bool:
        """Whether engines prepare what they run."""
        return not self.preparers


def for_script(runner: Runner, folder: Path) -> tuple[Runner, Plan]:
    """A script has one engine, as it need not be safe for threads. ``folder`` is for its requests' files."""
    _warm_up_script(runner, folder)
    return runner, Plan(1, 0, runner.batch_size, preparers=_preparers(1))


def for_built_in(functions: NetFunctions, cfg: Config, known: Plan | None = None) -> tuple[Runner, Plan]:
    """A warm net and its plan: ``known``, what the release says, or what measures best. Raises StartError."""
    values = Values("model_params", cfg["model_params"])
    engines = values.optional_positive_int("engines")
    if engines and engines > MAX_THREADS // 2:
        raise StartError(f"model_params.engines is {engines}, should be at most {MAX_THREADS // 2}")
    if known:
        chosen = _Candidate(functions, cfg, known.engines, known.threads)
        plan = known
    elif cfg["use_device"] != "CPU":
        chosen = _Candidate(functions, cfg, engines or 1, 0)
        plan = Plan(chosen.engines, 0, chosen.runner.batch_size, _preparers(chosen.engines))
    else:
        chosen, plan = _on_cpu(functions, cfg, engines, values.optional_positive_int("intra_op_threads"))
    chosen.warm_up(plan.batch_size)
    return chosen.runner, plan


def _preparers(engines: int) -> int:
    return min(cpus.available(), MAX_THREADS - engines)


def _on_cpu(functions: NetFunctions, cfg: Config, engines: int | None, threads: int | None) -> tuple[_Candidate, Plan]:
    shapes = _shapes(engines, threads)
    sizes = [cfg["batch_size"]] if cfg["batch_size"] else _sizes(_MAX_MEASURED_BATCH_SIZE)
    measured: dict[str, float] = {}
    best: _Candidate | None = None
    for shape in shapes:
        candidate = _Candidate(functions, cfg, *shape)
        if len(shapes) > 1:
            measured |= candidate.measure(sizes[:1])
        if best is None or candidate.least_s * _WORTH < best.least_s:
            best = candidate
    assert best
    if len(sizes) > 1:
        measured |= best.measure(sizes)
    size = best.smallest_worth_it(sizes)
    plan = Plan(best.engines, best.threads, size, 0 if best.threads == 1 else _preparers(best.engines))
    return best, replace(plan, measured={name: round(cost_s * 1000, 4) for name, cost_s in measured.items()})


def _shapes(engines: int | None, threads: int | None) -> list[tuple[int, int]]:
    """Engines and threads each that use the CPUs there are; fewer engines first."""
    available = cpus.available()
    if threads or engines:
        return [(engines or max(available // (threads or 1), 1), threads or max(available // (engines or 1), 1))]
    splits = {max(available >> shift, 1) for shift in range(available.bit_length())}
    return [(available // each, each) for each in sorted(splits, reverse=True)]


def _sizes(most: int) -> list[int]:
    """1, 2, 4, ... up to ``most``, and that itself."""
    return sorted({1 << shift for shift in range(most.bit_length())} | {most})


class _Candidate:
    """A net loaded for some engines with some threads each, and how fast it is in batches of each size."""

    def __init__(self, functions: NetFunctions, cfg: Config, engines: int, threads: int) -> None:
        """Raises StartError."""
        self.engines, self.threads = engines, threads
        params = cfg["model_params"] | ({"intra_op_threads": threads} if threads else {})
        self.runner = Runner(functions, {**cfg, "model_params": params})
        self._costs_s: dict[int, float] = {}

    @property
    def least_s(self) -> float:
        return min(self._costs_s.values(), default=0.0)

    def smallest_worth_it(self, sizes: Sequence[int]) -> int:
        """The smallest batch that costs about the least a request; the first where nothing was measured."""
        return next((size for size, cost_s in self._costs_s.items() if cost_s <= self.least_s * _WORTH), sizes[0])

    def measure(self, sizes: Sequence[int]) -> dict[str, float]:
        """CPU seconds a request by size, up to where larger batches no longer help. Raises StartError."""
        for size in sizes:
            if size in self._costs_s:
                continue
            least_s = self.least_s
            self._costs_s[size] = cost_s = self._cost_s(size)
            if least_s and cost_s * _WORTH > least_s:
                break
        return {f"{self.engines}x{self.threads} batch {size}": cost_s for size, cost_s in self._costs_s.items()}

    def _cost_s(self, size: int) -> float:
        batch = self._batch(size)
        self._infer(batch)
        counts = [0] * self.engines
        until_s = time.perf_counter() + _MEASURE_S

        def loop(engine: int) -> None:
            while not counts[engine] or time.perf_counter() < until_s:
                self._infer(batch)
                counts[engine] += 1

        began_s = time.process_time()
        with ThreadPoolExecutor(self.engines) as engines:
            list(engines.map(loop, range(self.engines)))
        return (time.process_time() - began_s) / (sum(counts) * size)

    def warm_up(self, most: int) -> None:
        """Runs batches of each size bucket, as requests will. Raises StartError."""
        for size in _sizes(most):
            _raise_any(self._infer(self._batch(size)))

    def _batch(self, size: int) -> list[Prepared]:
        req = {"data": {"uri": "", "body": sample()}}
        try:
            return [self.runner.prepare("warm-up", dict(req)) for _ in range(size)]
        except ServingError as error:
            raise StartError(f"the net failed to warm up: {error}") from error

    def _infer(self, batch: Sequence[Prepared]) -> list[Result | ServingError]:
        try:
            return self.runner.infer(batch)
        except ServingError as error:
            raise StartError(f"the net failed to warm up: {error}") from error


def _raise_any(outcomes: Sequence[Result | ServingError]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, ServingError):
            raise StartError(f"the net failed to warm up: {outcome}")


def _warm_up_script(runner: Runner, folder: Path) -> None:
    """Runs a picture through the script, alone and as full batches; as a group of two where it wants groups.

    A script may want more of a request than can be made up: what it refuses or fails is no more than a line in the log.
    """
    errors: list[ServingError] = []
    for images in (1, 2):
        outcomes = [each for size in _sizes(runner.batch_size) for each in _try(runner, folder, size, images)]
        errors = [outcome for outcome in outcomes if isinstance(outcome, ServingError)]
        if not errors:
            return
    log.warning("the script has not answered the warm-up's picture", code=errors[0].code, reason=errors[0].message)


def _try(runner: Runner, folder: Path, size: int, images: int) -> Sequence[Result | ServingError]:
    files = Files(folder)
    try:
        batch = []
        for _ in range(size):
            pictures = [{"uri": "", "body": sample()} for _ in range(images)]
            req: Req = {"data": pictures if images > 1 else pictures[0]}
            files.write(req)
            batch.append(runner.prepare("warm-up", req))
        return runner.infer(batch)
    except ServingError as error:
        return [error]
    finally:
        files.remove()
