"""Makes the plan of a net, and the net warm.

On a CPU the plan is measured when the net is loaded, where the release does not say it. What takes the least CPU time a
request wins: that is what bounds a machine in use, and unlike requests a second it can be measured on a machine that
others use too. On a GPU there is one engine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from atserving.errors import ServingError, StartError
from evaluator.images import sample
from evaluator.net_contract import Config, NetFunctions, Req
from evaluator.options import Options
from evaluator.runtime import cpus
from evaluator.worker.net_runner import NetRunner, Prepared, Result
from evaluator.worker.plan import Plan
from evaluator.worker.progress import MAX_THREADS
from evaluator.worker.request_codec import Files

log = structlog.get_logger()

# Of small nets: what is larger makes front and worker wait for each other more than it saves.
_MAX_MEASURED_BATCH_SIZE = 16
_LONGEST_BATCH_S = 0.05
_ROUNDS, _ROUND_S = 5, 0.01
# What goes with a batch whatever its size: messages, and threads that wake each other.
_PER_BATCH_S = 0.001
# A request that costs less is mostly Python; so much more CPU time, and engines only wait for each other's.
_MOSTLY_PYTHON_S, _IN_THE_WAY = 0.0003, 1.25
_MOST_HELP = 16
# Several threads an engine have to be that much cheaper: they wait for each other, and others decode for them.
_WORTH = 1.1


def for_script(runner: NetRunner, folder: Path) -> tuple[NetRunner, Plan]:
    """A script has one engine, as it need not be safe for threads. ``folder`` is for its requests' files."""
    _warm_up_script(runner, folder)
    return runner, Plan(1, 0, runner.batch_size, preparers=_preparers(1))


def for_built_in(functions: NetFunctions, cfg: Config, known: Plan | None = None) -> tuple[NetRunner, Plan]:
    """A warm net and its plan: ``known``, what the release says, or what measures best. Raises StartError."""
    values = Options("model_params", cfg["model_params"])
    engines, threads = values.optional_positive_int("engines"), values.optional_positive_int("intra_op_threads")
    if engines and engines > MAX_THREADS // 2:
        raise StartError(f"model_params.engines is {engines}, should be at most {MAX_THREADS // 2}")
    if known:
        net, plan = _Net(functions, cfg, known.threads), known
    elif cfg["use_device"] != "CPU":
        net = _Net(functions, cfg, 0)
        plan = Plan(engines or 1, 0, net.runner.batch_size, _preparers(engines or 1))
    else:
        net, plan = _on_cpu(functions, cfg, engines, threads)
    net.warm_up(plan.batch_size)
    return net.runner, plan


def _preparers(engines: int) -> int:
    return min(cpus.available(), MAX_THREADS - engines)


def _on_cpu(functions: NetFunctions, cfg: Config, engines: int | None, threads: int | None) -> tuple[_Net, Plan]:
    available = cpus.available()
    measured: dict[str, float] = {}
    if engines or threads:
        engines = engines or max(available // (threads or 1), 1)
        net = _Net(functions, cfg, threads or max(available // engines, 1))
    else:
        net = _Net(functions, cfg, 1)
        engines = net.scales_to(min(available, MAX_THREADS // 2), measured)
        if engines == available > 1:
            net, engines = _split(functions, cfg, net, measured)
    size = cfg["batch_size"] or net.best_batch_size(engines, measured)
    lanes = net.threads == 1
    # Lanes on every CPU need no help; an engine of several threads leaves CPUs idle now and then.
    preparers = min(max(available - engines, 0), _MOST_HELP) if lanes else _preparers(engines)
    in_ms = {name: round(cost_s * 1000, 4) for name, cost_s in measured.items()}
    return net, Plan(engines, net.threads, size, preparers, lanes, in_ms)


def _split(functions: NetFunctions, cfg: Config, net: _Net, measured: dict[str, float]) -> tuple[_Net, int]:
    """How all CPUs are best split: into engines of one thread (``net``), or fewer of more. Raises StartError."""
    available = cpus.available()
    best, engines, least_s = net, available, net.cost_s(available, 1, measured)
    for shift in range(1, available.bit_length()):
        threads = min(1 << shift, available)
        other = _Net(functions, cfg, threads)
        cost_s = other.cost_s(available // threads, 1, measured)
        if cost_s * _WORTH < least_s:
            best, engines, least_s = other, available // threads, cost_s
    return best, engines


def _sizes(most: int) -> list[int]:
    """1, 2, 4, ... up to ``most``, and that itself."""
    return sorted({1 << shift for shift in range(most.bit_length())} | {most})


class _Net:
    """A net loaded for some threads an engine, and what it costs."""

    def __init__(self, functions: NetFunctions, cfg: Config, threads: int) -> None:
        """Raises StartError."""
        self.threads = threads
        params = cfg["model_params"] | ({"intra_op_threads": threads} if threads else {})
        self.runner = NetRunner(functions, {**cfg, "model_params": params})

    def warm_up(self, most: int) -> None:
        """Runs batches of each size bucket, as requests will. Raises StartError."""
        for size in _sizes(most):
            for outcome in self._infer(self._batch(size)):
                if isinstance(outcome, ServingError):
                    raise StartError(f"the net failed to warm up: {outcome}")

    def scales_to(self, most: int, measured: dict[str, float]) -> int:
        """How many engines can run at once before they get in each other's way. Raises StartError.

        Where a request is mostly Python, more engines only pass the interpreter to and fro. Of a small net that is
        known without a measurement, which would be one of chance.
        """
        engines, alone_s = 1, self.cost_s(1, 1, measured)
        if alone_s < _MOSTLY_PYTHON_S:
            return engines
        for more in _sizes(most)[1:]:
            if self.cost_s(more, 1, measured) > alone_s * _IN_THE_WAY:
                break
            engines = more
        return engines

    def best_batch_size(self, engines: int, measured: dict[str, float]) -> int:
        """The cheapest, with what goes with each batch; none that takes long. Raises StartError."""
        best, least_s = 1, float("inf")
        for size in _sizes(_MAX_MEASURED_BATCH_SIZE):
            cost_s = self.cost_s(engines, size, measured)
            if size > 1 and cost_s * size / self.threads > _LONGEST_BATCH_S:
                break
            if cost_s + _PER_BATCH_S / size < least_s:
                best, least_s = size, cost_s + _PER_BATCH_S / size
        return best

    def cost_s(self, engines: int, size: int, measured: dict[str, float]) -> float:
        """CPU seconds a request where engines run batches of ``size``; goes into ``measured``. Raises StartError."""
        name = f"{engines}x{self.threads} batch {size}"
        if name not in measured:
            self._infer(self._batch(size))
            with ThreadPoolExecutor(engines) as pool:
                measured[name] = min(self._round_s(pool, engines, size) for _ in range(_ROUNDS))
        return measured[name]

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
