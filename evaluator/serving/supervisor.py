"""The worker for the evaluator: calls go in, each comes to one end, whatever becomes of the process."""

from __future__ import annotations

import asyncio
import itertools
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import structlog

from atserving.errors import DeadlineExceeded, Internal, ServingError, StartError, Unavailable
from atserving.v1 import evaluator_pb2
from evaluator.net_contract import Config
from evaluator.options import Options
from evaluator.serving.worker_process import WorkerProcess
from evaluator.worker import channel
from evaluator.worker.plan import Plan
from evaluator.worker.progress import Progress, Running

log = structlog.get_logger()

_INIT_TIMEOUT_S = 300.0
_LONGEST_WITHOUT_DEADLINE_S = 60.0
_LOOK_S = 0.1
# A call is not stuck before it has taken so many times the longest that was answered, and at least so long: a caller
# in a hurry must not get a script killed that is only at work. Nor may one slow call buy others for ever.
_PATIENCE, _LEAST_PATIENCE_S, _MOST_PATIENCE_S = 10.0, 1.0, 20.0

# However innocent a call may seem, it does not see more processes die.
_MOST_DEATHS = 3

_DIED = "the net's process died"


@dataclass(eq=False)
class _SupervisedCall:
    """A call that has not come to its end. ``deadline_s`` is of the monotonic clock."""

    call: evaluator_pb2.Call
    deadline_s: float
    answer: asyncio.Future[evaluator_pb2.Reply] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    sent: bool = False
    deaths: int = 0
    """How many processes died while they were at it, or might have been."""


class WorkerSupervisor:
    """Calls of a net that runs in a process of its own.

    1. A call is in ``_open`` from the beginning until its reply is there, or it fails. It gets one reply or error; its
       caller may go before.
    2. No more are sent than the worker can use: the rest waits here, where it leaves at no cost when its caller goes.
    3. The process is killed when a call is stuck: a deadline has passed (or ``model_params.script_timeout_s``), and it
       has been run for far longer than calls are. That call fails for it.
    4. When the process dies, what it was at tells who is to blame: one call fails for it. Where there were several, or
       it was killed (which is how a machine out of memory ends whom it likes), each of them runs again alone first. All
       others go to the next process as if nothing had been.
    """

    def __init__(self, cfg: Config) -> None:
        """Raises StartError where ``model_params`` are wrong. Starts nothing yet."""
        values = Options("model_params", cfg["model_params"])
        self.plan = Plan(1, 0, 1)
        self.on_batch: Callable[[int], None] = lambda _: None
        """Called with the size of each batch that ran."""
        self.on_restart: Callable[[], None] = lambda: None
        """Called when the process is to be started again."""
        self._cfg = cfg
        self._init_timeout_s = values.positive_number("init_timeout_s", _INIT_TIMEOUT_S)
        self._timeout_s = values.positive_number("script_timeout_s", math.inf)
        self._delay_s = 0.0
        self._progress = Progress()
        self._process: WorkerProcess | None = None
        self._calls: dict[int, _SupervisedCall] = {}
        self._ids = itertools.count(1)
        self._waiting: deque[_SupervisedCall] = deque()
        self._gone: list[int] = []
        self._sent = 0
        self._flushing = False
        self._suspects: deque[_SupervisedCall] = deque()
        self._started = self._stopped = False
        self._stuck: Running | None = None
        # Of a preparation (True), and of a batch.
        self._longest_s = {True: 0.0, False: 0.0}

    async def start(self) -> None:
        """Starts the process and its net, which may take long. Raises StartError."""
        self._process = await self._begin()
        self._started = True

    async def run(self) -> None:
        """Keeps the process up until cancelled. Raises StartError where it died and can't be started again.

        What is then open fails, in a way that sends a gate to another instance.
        """
        watching = asyncio.create_task(self._watch())
        try:
            while True:
                if self._process is None:
                    log.info("starting the net's process again")
                    self.on_restart()
                process = self._process or await self._begin()
                await self._serve(process)
                # Not before it is really gone: it writes down what it is at until then.
                self._after_death(killed=await process.gone() == -signal.SIGKILL)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            self._stopped = True
            self._fail(list(self._calls.values()), _stopped())

    async def close(self) -> None:
        """Ends the process for good."""
        if self._process:
            self._process.kill()
            await self._process.gone()
        self._progress.close()

    def configure(self, *, delay_s: float) -> None:
        """How long an idle engine waits for a batch to fill."""
        self._delay_s = delay_s
        if self._process:
            self._process.send(channel.Kind.SETTINGS, orjson.dumps({"delay_s": delay_s}))

    async def infer(self, call: evaluator_pb2.Call) -> evaluator_pb2.Reply:
        """The reply to a call whose resources are bodies, be it an error. Raises the ServingError that kept one away.

        The call's id is set here. Cancelling it takes the request back if it has not started.
        """
        if self._stopped:
            raise _stopped()
        call.id = next(self._ids)
        timeout_s = call.timeout_us / 1e6 or _LONGEST_WITHOUT_DEADLINE_S
        one = _SupervisedCall(call, time.monotonic() + timeout_s)
        self._calls[call.id] = one
        self._waiting.append(one)
        self._flush_soon()
        try:
            return await one.answer
        except asyncio.CancelledError:
            self._leave(one)
            raise

    @property
    def queued(self) -> int:
        """How many calls nothing in the worker is at."""
        running = [] if self._stopped else self._progress.running()
        return max(0, len(self._calls) - sum(len(each.ids) for each in running))

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._process.pid if self._process else None

    def _leave(self, one: _SupervisedCall) -> None:
        if one.sent:
            # It may be running: its end is still waited for, and it counts as late from now on.
            one.deadline_s = min(one.deadline_s, time.monotonic())
            self._gone.append(one.call.id)
            self._flush_soon()
        else:
            self._calls.pop(one.call.id, None)

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Sends what waits, as far as the worker has use for it, in one frame."""
        self._flushing = False
        if self._process is None or self._suspects:
            return
        if self._gone:
            self._process.send(channel.Kind.CANCELLED, orjson.dumps(self._gone))
            self._gone.clear()
        window = 2 * self.plan.batch_size * self.plan.engines + self.plan.preparers
        calls: list[_SupervisedCall] = []
        while self._waiting and self._sent + len(calls) < window:
            one = self._waiting.popleft()
            if one.call.id in self._calls:
                calls.append(one)
        if calls:
            self._send(self._process, calls)

    def _send(self, process: WorkerProcess, calls: Sequence[_SupervisedCall]) -> None:
        now_s = time.monotonic()
        for one in calls:
            one.sent = True
            one.call.timeout_us = max(1, round((one.deadline_s - now_s) * 1e6))
        self._sent += len(calls)
        process.send(channel.Kind.CALLS, *channel.calls([one.call.SerializeToString() for one in calls]))

    def _replies(self, frame: evaluator_pb2.ExchangeResponse) -> None:
        for reply in frame.replies:
            if reply.stages.leads and reply.stages.batch_size:
                self.on_batch(reply.stages.batch_size)
            one = self._calls.pop(reply.id, None)
            if one:
                self._sent -= one.sent
                stages = reply.stages
                self._took(stages.decode_us, preparing=True)
                self._took(stages.forward_us + stages.postprocess_us, preparing=False)
                if not one.answer.done():
                    one.answer.set_result(reply)
        if self._waiting:
            self._flush_soon()

    def _took(self, microseconds: int, *, preparing: bool) -> None:
        self._longest_s[preparing] = max(self._longest_s[preparing], microseconds / 1e6)

    async def _begin(self) -> WorkerProcess:
        self._progress.clear()
        process = WorkerProcess(self._progress, self._replies)
        # Those that run alone would wait in vain for others.
        delay_s = 0 if self._suspects else self._delay_s
        start = {"cfg": self._cfg, "plan": self.plan if self._started else None, "delay_s": delay_s}
        try:
            said = await process.start(start, self._init_timeout_s)
            self.plan = Plan(**said["plan"])
            for preparing, longest_s in zip((True, False), said["longest_s"], strict=True):
                self._longest_s[preparing] = max(self._longest_s[preparing], float(longest_s))
        except (TypeError, KeyError, ValueError):
            process.kill()
            raise StartError("the net's process says what none would") from None
        except BaseException:
            process.kill()
            raise
        return process

    async def _serve(self, process: WorkerProcess) -> None:
        """Returns when the process has ended. Those who may have killed the last one run first, each alone."""
        self._process = process
        while self._suspects and not process.ended.done():
            one = self._suspects[0]
            if one.call.id in self._calls and not one.answer.done():
                log.warning("a call during which the net's process died runs again, alone")
                self._send(process, [one])
                ends: list[asyncio.Future[Any]] = [one.answer, process.ended]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if process.ended.done():
                    return
            self._suspects.popleft()
        self.configure(delay_s=self._delay_s)
        self._flush_soon()
        await process.ended

    def _after_death(self, *, killed: bool) -> None:
        self._process = None
        stuck, self._stuck = self._stuck, None
        running = [stuck] if stuck else self._progress.running()
        at_work = [one for each in running for id_ in each.ids if (one := self._calls.get(id_))]
        late = [one for one in at_work if stuck and (one.deadline_s <= time.monotonic() or len(at_work) == 1)]
        again = set(self._suspects)
        self._suspects.extend(one for one in at_work if one not in late and one not in self._suspects)
        if late:
            self._fail(late, DeadlineExceeded("the net did not answer in time"))
        elif len(at_work) == 1 and (at_work[0] in again or not killed):
            log.error("the net's process died of a call")
            self._fail(at_work, Internal(_DIED))
            self._suspects = deque(one for one in self._suspects if one not in at_work)
        # Where nothing was at work, what was sent may have been too much to read.
        for one in at_work or [one for one in self._calls.values() if one.sent]:
            one.deaths += 1
        for one in self._calls.values():
            one.sent = False
        self._fail([one for one in self._calls.values() if one.deaths >= _MOST_DEATHS], Internal(_DIED))
        # A caller that has gone is no reason to run its request again.
        for one in [one for one in self._calls.values() if one.answer.done()]:
            del self._calls[one.call.id]
        self._sent = 0
        self._gone.clear()
        suspects = set(self._suspects)
        self._waiting = deque(one for one in self._calls.values() if one not in suspects)

    def _fail(self, calls: Iterable[_SupervisedCall], error: ServingError) -> None:
        for one in calls:
            self._calls.pop(one.call.id, None)
            if not one.answer.done():
                one.answer.set_exception(error)

    async def _watch(self) -> None:
        """Kills the process where a call is stuck."""
        while True:
            await asyncio.sleep(_LOOK_S)
            if self._process and not self._process.ended.done() and self._sent:
                now_s = time.monotonic()
                running = self._progress.running()
                stuck = next((each for each in running if self._is_stuck(each, now_s)), None)
                if stuck:
                    log.error("the net is stuck and its process is killed", seconds=round(now_s - stuck.since_s, 3))
                    self._stuck = stuck
                    self._process.kill()
                elif not running and self._is_silent(now_s):
                    log.error("the net's process does nothing about what it was sent, and is killed")
                    self._process.kill()

    def _is_silent(self, now_s: float) -> bool:
        """Whether a call is long overdue that nothing in the process is at: it was stopped, or has lost the thread."""
        return any(one.sent and one.deadline_s + _LEAST_PATIENCE_S <= now_s for one in self._calls.values())

    def _is_stuck(self, running: Running, now_s: float) -> bool:
        took_s = now_s - running.since_s
        if took_s > self._timeout_s:
            return True
        calls = [one for id_ in running.ids if (one := self._calls.get(id_))]
        longest_s = self._longest_s[running.preparing]
        patience_s = max(_LEAST_PATIENCE_S, min(_PATIENCE * longest_s, longest_s + _MOST_PATIENCE_S))
        return took_s > patience_s and any(one.deadline_s <= now_s for one in calls)


def _stopped() -> Unavailable:
    return Unavailable("the instance has stopped", refused=True)
