"""Supervises the worker process: restarts it, retries its calls, and gives every call exactly one reply."""

from __future__ import annotations

import asyncio
import itertools
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence

import orjson
import structlog

from atserving import lifecycle, link, telemetry
from atserving.errors import DeadlineExceeded, Internal, ServingError, Unavailable
from atserving.v1 import evaluator_pb2
from evaluator.net_config import NetConfig
from evaluator.sandbox import decision
from evaluator.sandbox.decision import SandboxSettings
from evaluator.serving import blame, gpu_state, patience
from evaluator.serving.calls import Outcome, SupervisedCall, Taker, either
from evaluator.serving.patience import Patience, Standstill
from evaluator.serving.report import Report
from evaluator.serving.window import Window
from evaluator.serving.worker_process import WorkerProcess
from evaluator.worker.plan import Plan
from evaluator.worker.progress import Progress, Running

log = structlog.get_logger()

_INIT_TIMEOUT_S = 300.0
_LONGEST_WITHOUT_DEADLINE_S = 60.0
_WATCH_S = 0.1

# A call fails after so many deaths of a worker that had it, even if it is never proven guilty.
_MAX_DEATHS = 3

_DIED = "the net's process died"

# A gate takes it as "for a moment only".
_AWAY_RETRY_S = 1.0


class WorkerSupervisor:
    """Runs the calls of a net in a worker process.

    1. A call is in ``_calls`` from its arrival until it gets its reply or error; its caller may leave earlier. The
       supervisor keeps its request until then.
    2. The supervisor sends only as many calls as the worker can use (:class:`Window`). The rest waits here, and costs
       nothing if its caller leaves.
    3. It kills the process if a call is stuck (:mod:`evaluator.serving.patience`), and fails that call.
    4. When the process dies, the progress memory tells its calls. One guilty call fails, suspects run again alone
       (:mod:`evaluator.serving.blame`), and all others run in the next process.
    5. From then on until the next process serves, the instance is away; so it is while the process answers nothing for
       far longer than usual (:meth:`Patience.still_s`). It hands back the calls that no process has worked on, and
       refuses new ones, so that gates ask other instances. Calls whose gate has no other stay.
    """

    def __init__(
        self, config: NetConfig, spare_bytes: int = 0, sandbox: SandboxSettings | None = None, *, timed: bool = False
    ) -> None:
        """Start nothing yet. Raises StartError if ``model_params`` are wrong, or a script may not run.

        The process leaves ``spare_bytes`` of the pod's memory to others. ``timed``: it tells when it did its work.
        """
        self.sandbox = decision.of_release(config, sandbox or SandboxSettings())
        """What the process may do."""
        self._spare_bytes = spare_bytes
        self.plan = Plan(1, 0, 1)
        self.gpu = ""
        """The UUID of the GPU that the process uses; empty without one."""
        self.on_batch: Callable[[int], None] = lambda _: None
        """The supervisor calls this with the size of each batch that ran."""
        self.on_restart: Callable[[], None] = lambda: None
        """The supervisor calls this before it restarts the process."""
        self.on_away: Callable[[bool], None] = lambda _: None
        """The supervisor calls this with True before it hands calls back, and with False once the process serves."""
        self.report: Report | None = None
        """The times of the last replies, if the process tells them."""
        self.last_away_s = 0.0, 0.0
        """When the instance last went away, and when it last came back, on the monotonic clock."""
        self._timed = timed
        self._config = config
        self._init_timeout_s = config.model_params.positive_number("init_timeout_s", _INIT_TIMEOUT_S)
        self._patience = Patience(config.model_params.positive_number("script_timeout_s", math.inf))
        self._delay_s = 0.0
        self._most = sys.maxsize
        self._timeout_s = 0.0
        self._progress = Progress()
        self._process: WorkerProcess | None = None
        self._calls: dict[int, SupervisedCall] = {}
        self._ids = itertools.count(1)
        self._window = Window()
        self._cancelled: list[int] = []
        self._flushing = False
        self._suspects: deque[SupervisedCall] = deque()
        self._started = self._stopped = self._away = False
        self._replies = 0
        self._stuck: Running | None = None

    async def start(self) -> None:
        """Start the process and load its net, which may take long. Raises StartError."""
        self._process = await self._begin()
        self._started = True

    async def run(self) -> None:
        """Keep the process up until cancelled. Raises StartError if it died and can't be restarted.

        Calls in flight then fail in a way that sends gates to another instance.
        """
        watching = asyncio.create_task(self._watch())
        try:
            while True:
                if self._process is None:
                    log.info("worker restarted")
                    self.on_restart()
                process = self._process or await self._begin()
                await self._serve(process)
                # Wait for its end: until then it writes to the progress memory.
                self._after_death(killed=await process.gone() == -signal.SIGKILL)
        finally:
            self._stopped = True
            self._fail(list(self._calls.values()), _stopped())
            await lifecycle.end([watching])

    async def close(self) -> None:
        """End the process for good."""
        if self._process:
            self._process.kill()
            await self._process.gone()
        self._progress.close()

    def configure(self, *, delay_s: float, most: int = sys.maxsize, timeout_s: float = 0.0) -> None:
        """Set how long an idle engine waits for a full batch, if there can be one: of ``most`` calls at a time.

        ``timeout_s`` is the app's timeout.
        """
        self._delay_s, self._most, self._timeout_s = delay_s, most, timeout_s
        self.tell_settings()

    def tell_settings(self) -> None:
        """Tell the process what it is to follow, if there is one: the next one learns it at its start."""
        if self._process:
            settings = {"delay_s": self._delay_s, "most": self._most, "log_level": telemetry.settings().level}
            self._process.write([link.frame(link.SETTINGS, orjson.dumps(settings))])

    def submit(
        self,
        reqid: bytes,
        request: link.Buffer,
        deadline_s: float | None,
        taker: Taker,
        *,
        stays: bool,
        batched: bool = False,
    ) -> SupervisedCall:
        """Run a serialized ``InferRequest`` whose resources are bodies; ``taker`` takes the outcome later.

        ``deadline_s`` is of the monotonic clock. Raises Unavailable once the supervisor has stopped, and while it is
        away unless the call ``stays``.
        """
        if self._stopped:
            raise _stopped()
        if self._away and not stays:
            raise _is_away()
        if deadline_s is None:
            deadline_s = time.monotonic() + _LONGEST_WITHOUT_DEADLINE_S
        late_s = max(deadline_s, time.monotonic() + self._timeout_s)
        one = SupervisedCall(next(self._ids), reqid, request, deadline_s, late_s, taker, stays, batched)
        self._calls[one.id] = one
        self._window.waiting.append(one)
        if not self._flushing:
            self._flush_soon()
        return one

    async def infer(self, request: evaluator_pb2.InferRequest, timeout_s: float = 0.0) -> link.Reply:
        """Return the reply to a request whose resources are bodies; the reply may hold an error.

        Cancelling this takes the request back if it has not started. Raises a ServingError if there is no reply.
        """
        deadline_s = time.monotonic() + timeout_s if timeout_s else None
        outcome = Outcome()
        one = self.submit(request.reqid.encode(), request.SerializeToString(), deadline_s, outcome, stays=True)
        try:
            return await outcome.reply
        except asyncio.CancelledError:
            self.cancel(one)
            raise

    @property
    def queued(self) -> int:
        """How many calls wait for a thread of the worker."""
        running = [] if self._stopped else self._progress.running()
        return max(0, len(self._calls) - sum(len(each.ids) for each in running))

    @property
    def replies(self) -> int:
        """How many replies the processes have sent, with the one that a taker gets at the moment."""
        return self._replies

    def working(self, one: SupervisedCall) -> Running | None:
        """Return what a thread of the process does for a call; None if it waits. This looks at all threads."""
        if self._stopped:
            return None
        return next((each for each in self._progress.running() if one.id in each.ids), None)

    @property
    def pid(self) -> int | None:
        """The process's id; None while there is no process."""
        return self._process.pid if self._process else None

    @property
    def is_away(self) -> bool:
        """Whether the process is dead or stands still."""
        return self._away

    def cancel(self, one: SupervisedCall) -> None:
        """Take a call back if it has not started; its taker hears no more of it."""
        if one.taker is None or one.id not in self._calls:
            return
        one.taker = None
        if one.ended:
            one.ended.set()
        if one.sent_s:
            # It may be running: wait for its end. It will not be sent again.
            one.request = b""
            self._cancelled.append(one.id)
            self._flush_soon()
        else:
            del self._calls[one.id]
            one.request = b""
            self._window.forget(self._calls)

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Send the waiting calls, up to the worker's in-flight window, together."""
        self._flushing = False
        if self._process is None or self._suspects:
            return
        if self._cancelled:
            self._process.write([link.cancel_frame(self._cancelled)])
            self._cancelled.clear()
        # What was written stays in memory until the worker reads it, even if the call has ended.
        window = self._window
        while window.waiting and self._process.writable and (calls := window.next(self.plan, self._calls)):
            self._send(self._process, calls)

    def _send(self, process: WorkerProcess, calls: Sequence[SupervisedCall]) -> None:
        now_s = time.monotonic()
        parts: list[link.Buffer] = []
        for one in calls:
            timeout_us = max(1, round(min(one.deadline_s - now_s, link.MAX_TIMEOUT_US / 1e6) * 1e6))
            flags = link.BATCHED if one.batched else 0
            parts += (link.call_head(one.id, timeout_us, flags, one.reqid, b"", len(one.request)), one.request)
            self._window.enter(one, now_s)
        process.write(parts)

    def _take_reply(self, reply: link.Reply) -> None:
        self._replies += 1
        if reply.leads and reply.batch_size:
            self.on_batch(reply.batch_size)
        one = self._calls.pop(reply.id, None)
        if one:
            self._window.leave(one)
            # A call that expired or was taken back has run for no time, which tells nothing; a batch tells once.
            if reply.decode_us:
                self._patience.learn_prepare(reply.decode_us / 1e6)
            if reply.leads and reply.batch_size:
                self._patience.learn_infer((reply.forward_us + reply.postprocess_us) / 1e6)
            one.end()
            if taker := one.release():
                taker.answered(reply)
        if self._window.waiting and not self._flushing:
            self._flush_soon()

    def _take_times(self, data: link.Buffer, start: int, end: int) -> None:
        self.report = Report(self._replies, link.part(data, start, end))

    async def _begin(self) -> WorkerProcess:
        self._progress.clear()
        process = WorkerProcess(self._progress, self._take_reply, self._take_times, self._flush_soon, self.sandbox)
        # A suspect runs alone, so its engine must not wait for a full batch.
        delay_s = 0 if self._suspects else self._delay_s
        start = {
            "cfg": self._config.to_cfg(),
            "plan": self.plan if self._started else None,
            "delay_s": delay_s,
            "spare_bytes": self._spare_bytes,
            "log_level": telemetry.settings().level,
            "timed": self._timed,
        }
        try:
            started = await process.start(start, self._init_timeout_s)
        except BaseException:
            process.kill()
            raise
        self.plan = started.plan
        self.gpu = gpu_state.checked(started.gpu)
        prepare_s, infer_s = started.longest_s
        self._patience.learn_prepare(prepare_s)
        self._patience.learn_infer(infer_s)
        return process

    async def _serve(self, process: WorkerProcess) -> None:
        """Run the suspects of the last death one by one, then all calls. Return when the process has ended."""
        self._process = process
        while self._suspects and not process.ended.done():
            one = self._suspects[0]
            if one.id in self._calls and one.taker:
                log.warning("suspect retried", reqid=one.reqid.decode())
                one.ended = asyncio.Event()
                self._send(process, [one])
                await either(one.ended, process.ended)
                if process.ended.done():
                    return
            self._suspects.popleft()
        self._come_back()
        self.tell_settings()
        self._flush_soon()
        await process.ended

    def _after_death(self, *, killed: bool) -> None:
        self._process = None
        stuck, self._stuck = self._stuck, None
        running = [stuck] if stuck else self._progress.running()
        at_work = [one for each in running for id_ in each.ids if (one := self._calls.get(id_))]
        now_s = time.monotonic()
        judgement = blame.judge(at_work, list(self._suspects), stuck=stuck is not None, killed=killed, now_s=now_s)
        self._suspects = deque(judgement.suspects)
        # If the process worked on no call, it may have died of reading one.
        for one in at_work or [one for one in self._calls.values() if one.sent_s]:
            one.deaths_s = (*one.deaths_s, now_s)
        self._fail(judgement.late, DeadlineExceeded("the net did not answer in time"))
        if judgement.guilty:
            log.error("worker crashed", reqid=judgement.guilty[0].reqid.decode())
            self._fail(judgement.guilty, Internal(_DIED))
        for one in self._calls.values():
            one.sent_s = 0.0
        self._fail([one for one in self._calls.values() if len(one.deaths_s) >= _MAX_DEATHS], Internal(_DIED))
        # Do not retry a request whose caller has left.
        for one in [one for one in self._calls.values() if one.taker is None]:
            del self._calls[one.id]
        self._cancelled.clear()
        self._go_away(_DIED, keep=())
        suspects = set(self._suspects)
        self._window.restart(one for one in self._calls.values() if one not in suspects)

    def _go_away(self, reason: str, keep: Container[SupervisedCall]) -> None:
        """Tell gates to ask others, and hand back the calls that no process has worked on, except those to ``keep``."""
        if not self._away:
            self._away = True
            self.last_away_s = time.monotonic(), 0.0
            self.on_away(True)
        # A call that was in a process that died may have killed it: it must not reach other instances.
        others = [one for one in self._calls.values() if not (one.stays or one.deaths_s or one in keep)]
        error = _is_away()
        handed_back = 0
        for one in others:
            if taker := one.taker:
                handed_back += 1
                self.cancel(one)
                taker.failed(error)
        log.warning("instance away", reason=reason, handed_back=handed_back)

    def _come_back(self) -> None:
        if self._away:
            self._away = False
            self.last_away_s = self.last_away_s[0], time.monotonic()
            self.on_away(False)
            log.info("instance back")

    def _fail(self, calls: Iterable[SupervisedCall], error: ServingError) -> None:
        for one in calls:
            self._calls.pop(one.id, None)
            one.end()
            if taker := one.release():
                taker.failed(error)

    async def _watch(self) -> None:
        """Kill the process if a call is stuck, or if the process no longer works at all."""
        busy_s = time.monotonic()
        partial_bytes = 0
        standstill = Standstill(2 * _WATCH_S)
        while True:
            await asyncio.sleep(_WATCH_S)
            now_s = time.monotonic()
            if not self._process or self._process.ended.done() or not self._window.sent:
                busy_s = now_s
                self._check_standstill(standstill.look(None, now_s))
                continue
            moved = self._process, self._replies, self._process.partial_bytes
            self._check_standstill(standstill.look(moved, now_s))
            running = self._progress.running()
            before, partial_bytes = partial_bytes, self._process.partial_bytes
            if running or partial_bytes > before:
                busy_s = now_s
            stuck = next((each for each in running if self._is_stuck(each, now_s)), None)
            if stuck:
                log.error("worker killed", reason="a call is stuck", stuck_s=round(now_s - stuck.since_s, 3))
                self._stuck = stuck
                self._process.kill()
            # A healthy worker is idle for a moment between a call and its reply, which may be long in coming.
            elif not running and now_s - busy_s >= patience.LEAST_S and self._is_overdue(now_s):
                log.error("worker killed", reason="it is unresponsive")
                self._process.kill()

    def _check_standstill(self, still_s: float) -> None:
        """Go away if the process has answered nothing for ``still_s`` while calls wait, and come back once it answers.

        A call that runs alone keeps nobody waiting.
        """
        if not self._process or self._process.ended.done() or self._suspects:
            # Away until the next process serves.
            return
        if not still_s:
            self._come_back()
        elif not self._away and still_s > self._patience.still_s(self.plan.batch_size) + self._delay_s:
            at_work = {id_ for each in self._progress.running() for id_ in each.ids}
            keep = {one for id_ in at_work if (one := self._calls.get(id_))}
            if any(one.taker and one not in keep for one in self._calls.values()):
                self._go_away(f"the net's process has answered nothing for {still_s:.1f} s", keep)

    def _is_overdue(self, now_s: float) -> bool:
        """Return whether the process has a call long past its deadline: it is stopped, or has lost its reader."""
        return any(one.sent_s and one.deadline_s + patience.LEAST_S <= now_s for one in self._calls.values())

    def _is_stuck(self, running: Running, now_s: float) -> bool:
        late_s = [one.late_s for id_ in running.ids if (one := self._calls.get(id_))]
        return self._patience.is_over(running, late_s, now_s)


def _is_away() -> Unavailable:
    return Unavailable(
        "the net's process restarts, or stands still", refused=True, retry_after_s=_AWAY_RETRY_S, refusal="away"
    )


def _stopped() -> Unavailable:
    return Unavailable("the instance has stopped", refused=True, refusal="leaving")
