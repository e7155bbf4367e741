"""Plans how a net runs, and warms it up.

On a CPU, planning measures the net at load, unless the release sets the plan. The plan with the least CPU time per
request wins: CPU time bounds a loaded machine, and unlike throughput it can be measured on a machine that others use
too. If engines have one thread each, a lone request may get a session of its own with a thread for each CPU, for which
it would wait else. A GPU gets one engine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from atserving.errors import ServingError, StartError
from evaluator.images import sample
from evaluator.net_config import NetConfig
from evaluator.net_contract import LoadNet, Req
from evaluator.runtime import cpus, memory
from evaluator.worker.net_runner import NetRunner, Prepared, Result
from evaluator.worker.plan import Plan
from evaluator.worker.progress import MAX_THREADS
from evaluator.worker.request_codec import Files

log = structlog.get_logger()

# For small nets: larger batches make front and worker wait for each other longer than they save.
_MAX_MEASURED_BATCH_SIZE = 16
_LONGEST_BATCH_S = 0.05
_ROUNDS, _ROUND_S = 3, 0.006
# The fixed cost of a batch: messages, and threads that wake each other.
_PER_BATCH_S = 0.001
# A cheaper request is mostly Python. If more engines cost more by this factor, they contend for the GIL.
_MOSTLY_PYTHON_S, _MAX_CONTENTION = 0.0003, 1.25
_MAX_HELPERS = 16
# Threads of a shorter request wait for each other more than they work.
_LEAST_SPLIT_S = 0.001
# Engines of several threads must be cheaper by this factor: their threads wait for each other.
_MIN_GAIN = 1.1
# A session for lone requests must be so much faster than an engine of one thread, to be worth its memory.
_MIN_WIDE_GAIN = 1.15
# Weights and the memory of a run, by the weights alone.
_WIDE_FACTOR = 3


def for_script(runner: NetRunner, folder: Path) -> tuple[NetRunner, Plan]:
    """Plan one engine, since a script need not be thread-safe. ``folder`` holds the files of its requests."""
    _warm_up_script(runner, folder)
    return runner, Plan(1, 0, runner.batch_size, preparers=_preparers(1))


def for_built_in(load: LoadNet, config: NetConfig, known: Plan | None = None) -> tuple[NetRunner, Plan]:
    """Return a warm net and its plan: ``known``, the release's own, or the best measured. Raises StartError."""
    options = config.model_params
    engines, threads = options.optional_positive_int("engines"), options.optional_positive_int("intra_op_threads")
    if engines and engines > MAX_THREADS // 2:
        raise StartError(f"model_params.engines is {engines}, should be at most {MAX_THREADS // 2}")
    if known:
        net, plan = _Net(load, config, known.threads), known
        if known.wide and _has_memory(config):
            wide = _Net(load, config, cpus.available())
            wide.warm_up(1)
            net.runner.wide = wide.runner
    elif config.use_device != "CPU":
        net = _Net(load, config, 0)
        plan = Plan(engines or 1, 0, net.runner.batch_size, _preparers(engines or 1))
    else:
        net, plan = _on_cpu(load, config, engines, threads)
        # Planning has tried larger batches than will run.
        for runner in filter(None, (net.runner, net.runner.wide)):
            runner.shrink()
    net.warm_up(plan.batch_size)
    return net.runner, plan


def _preparers(engines: int) -> int:
    return min(cpus.available(), MAX_THREADS - engines)


def _on_cpu(load: LoadNet, config: NetConfig, engines: int | None, threads: int | None) -> tuple[_Net, Plan]:
    available = cpus.available()
    measured: dict[str, float] = {}
    wide = False
    if engines or threads:
        engines = engines or max(available // (threads or 1), 1)
        net = _Net(load, config, threads or max(available // engines, 1))
    else:
        net = _Net(load, config, 1)
        engines = net.scales_to(min(available, MAX_THREADS // 2), measured)
        if engines == available > 1 and measured[_name(1, 1, 1)] >= _LEAST_SPLIT_S:
            nets = {1: net}
            engines, threads = _split(load, config, nets, measured)
            net = nets[threads]
            wide = engines == available and _widen(config, net, nets[available], measured)
    size = config.batch_size or net.best_batch_size(engines, measured)
    lanes = net.threads == 1
    # Lanes on every CPU need no helpers; an engine of several threads leaves CPUs idle at times.
    preparers = min(max(available - engines, 0), _MAX_HELPERS) if lanes else _preparers(engines)
    # While all engines work nobody reads; only helpers with slow pictures would have used that time.
    reads = lanes and (preparers == 0 or measured.get(_name(1, 1, 1), math.inf) < _MOSTLY_PYTHON_S)
    in_ms = {name: round(cost_s * 1000, 4) for name, cost_s in measured.items()}
    return net, Plan(engines, net.threads, size, preparers, lanes, reads, wide, in_ms)


def _split(load: LoadNet, config: NetConfig, nets: dict[int, _Net], measured: dict[str, float]) -> tuple[int, int]:
    """Split all CPUs, into engines of one thread or fewer of more threads; return how many, and the threads of each.

    ``nets`` has a net of one thread; those of more threads are added. Raises StartError.
    """
    available = cpus.available()
    best, least_s = (available, 1), nets[1].cost_s(available, 1, measured)
    for threads in _sizes(available)[1:]:
        nets[threads] = _Net(load, config, threads)
        cost_s = nets[threads].cost_s(available // threads, 1, measured)
        if cost_s * _MIN_GAIN < least_s:
            best, least_s = (available // threads, threads), cost_s
        # Only those that may be taken stay loaded: a large net takes much memory.
        for each in nets.keys() - {1, best[1], available}:
            del nets[each]
    return best


def _widen(config: NetConfig, net: _Net, wide: _Net, measured: dict[str, float]) -> bool:
    """Give a net another session for lone requests, if that is faster and there is memory. Raises StartError."""
    if not _has_memory(config):
        return False
    if wide.alone_s(measured) * _MIN_WIDE_GAIN > net.alone_s(measured):
        return False
    net.runner.wide = wide.runner
    return True


def _has_memory(config: NetConfig) -> bool:
    """Return whether there is memory for another session."""
    weights = config.tar_files.get("weight.caffemodel")
    return not weights or weights.stat().st_size * _WIDE_FACTOR <= memory.available_bytes()


def _name(engines: int, threads: int, size: int) -> str:
    return f"{engines}x{threads} batch {size}"


def _sizes(most: int) -> list[int]:
    """Return 1, 2, 4, ... up to ``most``, and ``most`` itself."""
    return sorted({1 << shift for shift in range(most.bit_length())} | {most})


class _Net:
    """A net loaded with some number of threads per engine, and its measured costs."""

    def __init__(self, load: LoadNet, config: NetConfig, threads: int) -> None:
        """Raises StartError."""
        self.threads = threads
        self.runner = NetRunner(load, config.with_threads(threads))

    def warm_up(self, most: int) -> None:
        """Run batches of each size that requests will form. Raises StartError."""
        for size in _sizes(most):
            for outcome in self._infer(self._batch(size)):
                if isinstance(outcome, ServingError):
                    raise StartError(f"the net failed to warm up: {outcome}")

    def scales_to(self, most: int, measured: dict[str, float]) -> int:
        """Return how many engines can run at once before they contend with each other. Raises StartError.

        If a request is mostly Python, more engines only pass the GIL around. For a small net this is known, and a
        measurement would be noise.
        """
        engines, alone_s = 1, self.cost_s(1, 1, measured)
        if alone_s < _MOSTLY_PYTHON_S:
            return engines
        for more in _sizes(most)[1:]:
            if self.cost_s(more, 1, measured) > alone_s * _MAX_CONTENTION:
                break
            engines = more
        return engines

    def best_batch_size(self, engines: int, measured: dict[str, float]) -> int:
        """Return the cheapest size, fixed costs included, whose batches take not too long. Raises StartError."""
        best, least_s = 1, float("inf")
        for size in _sizes(_MAX_MEASURED_BATCH_SIZE):
            cost_s = self.cost_s(engines, size, measured)
            if size > 1 and cost_s * size / self.threads > _LONGEST_BATCH_S:
                break
            if cost_s + _PER_BATCH_S / size < least_s:
                best, least_s = size, cost_s + _PER_BATCH_S / size
        return best

    def cost_s(self, engines: int, size: int, measured: dict[str, float]) -> float:
        """Measure the CPU seconds per request with batches of ``size``, and record them. Raises StartError."""
        name = _name(engines, self.threads, size)
        if name not in measured:
            self._infer(self._batch(size))
            with ThreadPoolExecutor(engines) as pool:
                measured[name] = min(self._round_s(pool, engines, size) for _ in range(_ROUNDS))
        return measured[name]

    def alone_s(self, measured: dict[str, float]) -> float:
        """Measure the wall seconds of a lone request, and record them. Raises StartError."""
        batch = self._batch(1)
        self._infer(batch)
        took_s = []
        for _ in range(_ROUNDS):
            began_s = time.perf_counter()
            self._infer(batch)
            took_s.append(time.perf_counter() - began_s)
        measured[f"alone on {self.threads}"] = min(took_s)
        return min(took_s)

    def _round_s(self, pool: ThreadPoolExecutor, engines: int, size: int) -> float:
        until_s = time.perf_counter() + _ROUND_S

        def loop(_: int) -> int:
            count = 0
            while not count or time.perf_counter() < until_s:
                self._infer(self._batch(size))
                count += size
            return count

        began_s = time.process_time()
        count = sum(pool.map(loop, range(engines)))
        return (time.process_time() - began_s) / count

    def _batch(self, size: int) -> list[Prepared]:
        try:
            return [self.runner.prepare("warm-up", {"data": {"uri": "", "body": sample()}}) for _ in range(size)]
        except ServingError as error:
            raise StartError(f"the net failed to warm up: {error}") from error

    def _infer(self, batch: Sequence[Prepared]) -> list[Result | ServingError]:
        try:
            return self.runner.infer(batch)
        except ServingError as error:
            raise StartError(f"the net failed to warm up: {error}") from error


def _warm_up_script(runner: NetRunner, folder: Path) -> None:
    """Run a made-up picture through the script, alone and in full batches; as a group of two if it refuses that.

    A script may need more than a made-up request has, so a failure is only logged.
    """
    errors: list[ServingError] = []
    for images in (1, 2):
        outcomes = [each for size in _sizes(runner.batch_size) for each in _try(runner, folder, size, images)]
        errors = [outcome for outcome in outcomes if isinstance(outcome, ServingError)]
        if not errors:
            return
    log.warning("warm-up refused", code=errors[0].code, reason=errors[0].message)


def _try(runner: NetRunner, folder: Path, size: int, images: int) -> Sequence[Result | ServingError]:
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
