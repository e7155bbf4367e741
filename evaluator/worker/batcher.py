"""Dynamic batching: the worker's threads take work from the schedule, do it, and report the results.

This module knows nothing of gRPC, images or nets.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import structlog

from atserving.errors import DeadlineExceeded, Internal, ServingError
from evaluator.limits import most_batched
from evaluator.worker.schedule import Expired, Forward, Item, Prepare, Schedule, Wait

log = structlog.get_logger()

# Faster preparation is mostly Python, and more threads would only contend for the GIL.
_WORTH_HELP_S = 0.0005


@dataclass(slots=True)
class ItemResult:
    """The outcome of one request, and the seconds of each stage."""

    item: Item
    outcome: Any
    """The result of ``infer``, or the ServingError of a failed request."""
    queue_s: float = 0.0
    forward_s: float = 0.0
    postprocess_s: float = 0.0
    batch_size: int = 0


class Work(Protocol):
    """The work on requests. Its calls may take long, and may raise a ServingError."""

    def prepare(self, item: Item) -> Any:
        """Prepare a request for ``infer``."""

    def infer(self, prepared: Sequence[Any]) -> tuple[Sequence[Any], float]:
        """Return one outcome per request, in order, and the seconds inside the engine."""


class ProgressLog(Protocol):
    """Records the requests of each thread, so that the supervisor can find the cause of a crash."""

    def begin(self, thread: int, ids: Sequence[int], *, preparing: bool) -> None: ...

    def end(self, thread: int) -> None: ...


class Inlet(Protocol):
    """Where engines get requests from by themselves. One thread at a time reads."""

    def take(self) -> None:
        """Submit what has arrived to the batcher, without waiting."""

    def wait(self, timeout_s: float | None) -> None:
        """Wait for requests, a notification or the timeout, and submit what has arrived."""

    def notify(self) -> None:
        """End a wait, from another thread."""


class _Idler(Protocol):
    """A thread without work."""

    def notify(self) -> None: ...


class Batcher:
    """Runs requests in threads. Each request gets exactly one result.

    If a batch fails as a whole, its requests run again one by one, so that only the faulty ones fail.

    Engine threads either are lanes, which prepare a batch and then run it, or only run batches. Preparer threads only
    prepare; next to lanes they help only if preparing takes long enough.
    """

    def __init__(
        self,
        schedule: Schedule,
        work: Work,
        report: Callable[[Sequence[ItemResult]], None],
        progress: ProgressLog,
        *,
        lanes: bool,
        inlet: Inlet | None = None,
    ) -> None:
        """Any thread calls ``report`` with the results of requests that are done.

        With an inlet, an idle engine reads the requests, and no thread has to wake it for them. While all engines work
        nobody reads.
        """
        self._schedule = schedule
        self._work = work
        self._report = report
        self._progress = progress
        self._items: dict[int, Item] = {}
        self._most = sys.maxsize
        # How many of the items are no tasks of batches.
        self._singles = 0
        self._lock = threading.Lock()
        # Idle engine threads, and idle preparers. The last one to go idle wakes first: its CPU's cache is still warm.
        self._forwarders: list[_Idler] = []
        self._preparers: list[_Idler] = []
        self._lanes = lanes
        self._prepare_s = 0.0
        self._inlet = inlet
        self._reading = False

    def submit(self, items: Sequence[Item]) -> bool:
        """Take requests in; if memory is short, take none and return False.

        Their ids must differ from those of all requests without a result.
        """
        with self._lock:
            try:
                self._items.update((item.id, item) for item in items)
                self._schedule.arrive(items)
                self._singles += sum(not item.batched for item in items)
            except MemoryError:
                for item in items:
                    self._items.pop(item.id, None)
                    self._schedule.remove(item)
                return False
            # The engine that has read them takes one itself.
            self._wake(len(items) - self._reading)
        return True

    def cancel(self, ids: Iterable[int]) -> None:
        """Drop requests whose callers have left. A waiting request leaves; a running one finishes."""
        with self._lock:
            items = [item for id_ in ids if (item := self._items.get(id_))]
            removed = [item for item in items if self._schedule.remove(item)]
            self._wake()
        self._fail(removed, DeadlineExceeded("the caller has gone"))

    def configure(self, *, delay_s: float, most: int) -> None:
        """Set how long an idle engine waits for a full batch; this also applies to waiting requests.

        ``most`` requests may be in the instance at a time, tasks of batches fewer: none waits for one that must not
        come.
        """
        with self._lock:
            self._schedule.delay_s = delay_s
            self._most = most
            _wake(self._forwarders, len(self._forwarders))

    def run(self, thread: int, *, forwards: bool, prepares: bool) -> None:
        """Run one thread's loop, which never returns. ``thread`` is its slot in the progress log."""
        while True:
            self._do(thread, self._next(forwards=forwards, prepares=prepares), forwards)

    def _do(self, thread: int, work: Prepare | Forward | Expired, forwards: bool) -> None:
        """Do some work. An idle thread keeps none of it in memory."""
        if isinstance(work, Prepare):
            for item in work.items:
                self._prepare(thread, item, forwards)
        elif isinstance(work, Forward):
            self._forward(thread, work.items)
        else:
            self._fail(work.items, DeadlineExceeded("the deadline passed"))

    def _next(self, *, forwards: bool, prepares: bool) -> Prepare | Forward | Expired:
        inlet = self._inlet if forwards else None
        with self._lock:
            if inlet and not self._reading:
                # All that has arrived meanwhile forms the next batch.
                self._read(inlet, inlet.take)
            while True:
                idle = 1 + len(self._forwarders) + (len(self._preparers) if self._preparers_help else 0)
                full = len(self._items) >= (self._most if self._singles else most_batched(self._most))
                work = self._schedule.next(time.monotonic(), forwards=forwards, prepares=prepares, idle=idle, full=full)
                if not isinstance(work, Wait):
                    self._wake()
                    if inlet and not self._reading:
                        # Another idle thread reads in place of this one.
                        _wake(self._forwarders)
                    return work
                timeout_s = None if math.isinf(work.until_s) else max(work.until_s - time.monotonic(), 0)
                if inlet and not self._reading:
                    self._forwarders.append(inlet)
                    self._read(inlet, partial(inlet.wait, timeout_s))
                    continue
                mine = threading.Condition(self._lock)
                idlers = self._forwarders if forwards else self._preparers
                idlers.append(mine)
                # On a notification the waker has removed it; on a timeout remove it here.
                if not mine.wait(timeout_s) and mine in idlers:
                    idlers.remove(mine)

    def _read(self, inlet: Inlet, read: Callable[[], None]) -> None:
        """Read requests without the lock, as the only thread that does."""
        self._reading = True
        self._lock.release()
        try:
            read()
        finally:
            self._lock.acquire()
            self._reading = False
            if inlet in self._forwarders:
                self._forwarders.remove(inlet)

    @property
    def _preparers_help(self) -> bool:
        return not self._lanes or self._prepare_s >= _WORTH_HELP_S

    def _wake(self, count: int = 1) -> None:
        """Wake up to ``count`` idle threads if there is work for them."""
        if self._schedule.has_arrived:
            if self._lanes:
                _wake(self._forwarders, count)
            if self._preparers_help:
                _wake(self._preparers, count)
        if self._schedule.ready:
            _wake(self._forwarders)

    def _prepare(self, thread: int, item: Item, forwards: bool) -> None:
        began_s = time.monotonic()
        error: ServingError | None = None
        if item.cancelled or item.expires_s <= began_s:
            error = DeadlineExceeded("the deadline passed, or the caller has gone")
        else:
            item.began_s = began_s
            self._progress.begin(thread, [item.id], preparing=True)
            try:
                item.prepared = self._work.prepare(item)
            except ServingError as failure:
                error = failure
            except Exception:
                log.exception("request preparation failed")
                error = Internal("the evaluator failed to prepare the request")
            finally:
                self._progress.end(thread)
                item.request = None
            item.prepare_s = time.monotonic() - began_s
        with self._lock:
            self._prepare_s += (item.prepare_s - self._prepare_s) / 8
            waits = self._schedule.prepared(item, fit=error is None)
            # A lane runs a single request itself; waking another thread would cost more.
            if self._schedule.ready > forwards:
                _wake(self._forwarders)
        if not waits:
            self._fail([item], error or DeadlineExceeded("the caller has gone"))
        # Its trace holds this frame: a circle would keep the request until the next garbage collection.
        del error

    def _forward(self, thread: int, items: Sequence[Item]) -> None:
        began_s = time.monotonic()
        self._progress.begin(thread, [item.id for item in items], preparing=False)
        try:
            outcomes, forward_s = self._work.infer([item.prepared for item in items])
            if len(outcomes) != len(items):
                raise Internal("the forward pass lost a request")
        except Exception as error:
            self._progress.end(thread)
            self._after_failure(thread, items, error)
            return
        self._progress.end(thread)
        postprocess_s = time.monotonic() - began_s - forward_s
        self._finish(
            [
                ItemResult(
                    item,
                    outcome,
                    began_s - item.arrived_s - item.prepare_s,
                    forward_s,
                    postprocess_s,
                    len(items),
                )
                for item, outcome in zip(items, outcomes, strict=True)
            ]
        )

    def _after_failure(self, thread: int, items: Sequence[Item], error: Exception) -> None:
        if len(items) > 1:
            for item in items:
                item.again = True
                self._forward(thread, [item])
            return
        if not isinstance(error, ServingError):
            log.error("batch failed", exc_info=error)
            error = Internal("the forward pass failed")
        self._fail(items, error)

    def _fail(self, items: Sequence[Item], error: ServingError) -> None:
        if items:
            self._finish([ItemResult(item, error) for item in items])

    def _finish(self, results: Sequence[ItemResult]) -> None:
        with self._lock:
            for result in results:
                del self._items[result.item.id]
                self._singles -= not result.item.batched
        self._report(results)


def _wake(idlers: list[_Idler], count: int = 1) -> None:
    for _ in range(min(count, len(idlers))):
        idlers.pop().notify()
