"""Connects to an evaluator instance. No other module of the gate knows how requests travel there."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections import deque
from contextlib import suppress
from typing import Any

import structlog

from atserving import lifecycle, link
from atserving.config import Instance
from atserving.deadlines import Deadlines
from atserving.errors import Unavailable
from atserving.held import HeldBytes
from atserving.tls import CLOSE_S, EVALUATOR, Tls, why
from atserving.v1 import evaluator_pb2
from atserving.wire import Buffer
from gate import bodies, pace, responses
from gate.answers import Answer, Slow, TransportError
from gate.bodies import Body
from gate.instance_link import InstanceLink
from gate.pace import Pace
from gate.record import Attempt

log = structlog.get_logger()

CONNECT_TIMEOUT_S = 2.0
# How long the first and the last of many attempts wait for the next.
_PAUSES_S = (0.1, 5.0)
# The gate ends a call at its deadline. The instance does so a little later, in case the gate can't.
_LATER_S = 0.01
# The bound of a connection that is given none.
_MOST_HELD_BYTES = 256 << 20
# The calls of one write, so that a cancellation can still overtake large ones.
_WRITE_BYTES = 1 << 20
# The calls that one frame cancels.
_MOST_CANCELLED = 4096
# How often a connection with pending calls looks for late ones, and when a late one that none could take is so again.
_LOOK_S, _HEDGE_AGAIN_S = 0.1, 1.0
# A busy instance sends something in each interval. After so many without anything it has frozen, or is about to.
_MOST_QUIET = 2


class EvaluatorConnection:
    """One instance, reached over one long-lived link that is opened at once, and again after it breaks.

    A call enters ``_outbox``; at the end of the loop's turn all waiting calls leave together. It stays in ``_pending``
    until its reply arrives, its caller leaves, its deadline passes, or the link breaks. While the instance is
    unreachable, calls fail at once; no call waits for a connection that has failed.
    """

    def __init__(
        self,
        instance: Instance,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        held: HeldBytes | None = None,
        tls: Tls | None = None,
    ) -> None:
        """``held`` bounds the bytes of long answers that arrive."""
        self._instance = instance
        self._tls = tls
        self._held = held or HeldBytes(_MOST_HELD_BYTES)
        self._connect_timeout_s = connect_timeout_s
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._pending: dict[int, Answer] = {}
        self._outbox: deque[Answer] = deque()
        self._abandoned: list[int] = []
        self._deadlines = Deadlines(self._pending, self._expire)
        self._link: InstanceLink | None = None
        self._flushing = False
        self._down = ""
        self._pause_s = _PAUSES_S[0]
        self._wanted = asyncio.Event()
        self._running = asyncio.create_task(self._run())
        self.is_away = False
        """Whether others should be asked first: the instance has said it, or says nothing although it should."""
        self._said_away = self._is_silent = False
        self._pace = Pace()
        self._hedges = False
        self._looking: asyncio.TimerHandle | None = None

    def ask(
        self,
        request: evaluator_pb2.InferRequest,
        deadline_s: float,
        reqid: str,
        traceparent: str | None,
        body: Body | None = None,
        *,
        stays: bool = False,
        hedges: bool = False,
        batched: bool = False,
        fetches: bool = False,
        attempt: Attempt | None = None,
    ) -> Answer:
        """Return the future of the instance's response. Cancelling it also cancels the work on the instance.

        ``body`` is a large resource, the only one; ``request`` has none then.
        ``deadline_s`` is of the monotonic clock; after it the future has a TimeoutError. The future has a
        TransportError if the link breaks. Raises TransportError while there is no link.
        ``stays``: no other instance can take the call. ``hedges``: the future is :class:`Slow`, once, if the net is
        built in and answers far later than usual, or if the call stays at an instance that is away for long.
        ``attempt`` gets the reply.
        """
        if self._down:
            self._wanted.set()
            raise TransportError(self._down, reached=False)
        answer = Answer(loop=self._loop)
        answer.id = id_ = next(self._ids)
        answer.abandon = self._abandon
        answer.deadline_s = deadline_s
        answer.asked_s = time.monotonic()
        answer.hedge_s = 0.0 if hedges else math.inf
        answer.flags = (link.STAY if stays else 0) | (link.BATCHED if batched else 0) | (link.FETCH if fetches else 0)
        if body:
            answer.parts, answer.length = bodies.serialized(request, body)
        else:
            serialized = request.SerializeToString()
            answer.parts, answer.length = (serialized,), len(serialized)
        answer.sent_s = answer.asked_s if answer.length < link.LONG_BYTES else deadline_s
        answer.reqid = reqid.encode()
        answer.traceparent = traceparent.encode() if traceparent else b""
        answer.sent = False
        answer.waits = stays and self._said_away
        answer.held = 0
        answer.attempt = attempt
        self._pending[id_] = answer
        self._outbox.append(answer)
        self._deadlines.add(deadline_s, id_)
        self._flush_soon()
        if self._looking is None and (self._hedges or self.is_away):
            self._looking = self._loop.call_later(_LOOK_S, self._look)
        return answer

    def hedge_later(self, answer: Answer) -> None:
        """Let a slow call, for which no other instance was free, be slow again after a moment."""
        answer.hedge_s = time.monotonic() + _HEDGE_AGAIN_S
        if not self._is_silent:
            self._pace.give_back()

    async def close(self) -> None:
        """Close at once; calls in flight fail."""
        await lifecycle.end([self._running])
        self._deadlines.close()
        if self._looking:
            self._looking.cancel()

    @property
    def is_up(self) -> bool:
        """Whether the instance is connected, and has named itself."""
        return self._link is not None

    async def _run(self) -> None:
        try:
            while True:
                try:
                    reason = await self._connected()
                except Exception:
                    # Callers must not wait on a link without a reader.
                    log.exception("link failed", instance=self._instance.id)
                    reason = "the link failed unexpectedly"
                self._fail(reason)
                await self._pause()
        finally:
            self._fail("the connection was closed")

    async def _pause(self) -> None:
        """Wait before the next attempt: longer each time, but only for a moment if a call wants the instance."""
        least, most = _PAUSES_S
        await asyncio.sleep(least)
        # Not all at once: the instances of a node may end together.
        rest_s = random.uniform(self._pause_s / 2, self._pause_s)  # noqa: S311
        self._pause_s = min(2 * self._pause_s, most)
        self._wanted.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(rest_s):
                await self._wanted.wait()

    async def _connected(self) -> str:
        """Connect and exchange frames. Return the reason of the end."""
        host, _, port = self._instance.address.rpartition(":")
        wire: InstanceLink | None = None
        tls = self._tls
        name = tls.uri(f"{EVALUATOR}/{self._instance.app}") if tls else None
        secure: dict[str, Any] = {"ssl": tls.client, "ssl_shutdown_timeout": CLOSE_S} if tls else {}
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, wire = await self._loop.create_connection(
                    lambda: InstanceLink(self._instance, self._replied, self._flush, self._set_away, self._quiet, name),
                    host.strip("[]"),
                    int(port),
                    **secure,
                )
                wire.reader.admit = self._admit
                wire.long_left = self._long_left
                self._hedges = await wire.greeted
            self._down = ""
            self._pause_s = _PAUSES_S[0]
            self._link = wire
            self._flush_soon()
            if self._hedges and self._looking is None:
                self._look()
            return await wire.ended
        except TimeoutError:
            return f"no connection within {self._connect_timeout_s:g} s"
        except OSError as error:
            return why(error)
        except TransportError as error:
            return str(error)
        finally:
            self._link = None
            self.is_away = self._said_away = self._is_silent = False
            if wire:
                wire.abort()

    def _admit(self, id_: int, length: int) -> bool:
        """Count a long answer that arrives. Return False if nobody waits for it, or there is no room for it."""
        answer = self._pending.get(id_)
        if answer is None or answer.held:
            return False
        if not self._held.take(length, large=True):
            self._abandon(id_)
            answer.set_exception(
                Unavailable("the gate holds as many bytes as it may", retry_after_s=1.0, refusal="memory")
            )
            return False
        answer.held = length
        # The time that it needs to arrive tells of the link.
        if not answer.flags & link.FETCH:
            self._pace.learn(time.monotonic() - answer.sent_s)
        return True

    def _long_left(self, id_: int) -> None:
        answer = self._pending.get(id_)
        if answer:
            answer.sent_s = time.monotonic()

    def _replied(self, reply: link.Reply) -> None:
        answer = self._pending.pop(reply.id, None)
        if answer:
            self._held.give(answer.held)
            if reply.outcome == link.RESULT and not (answer.held or answer.flags & link.FETCH):
                self._pace.learn(time.monotonic() - answer.sent_s)
            response = responses.read(reply.response)
            if answer.attempt:
                answer.attempt.replied(reply, response)
            answer.set_result(response)

    def _abandon(self, id_: int) -> None:
        answer = self._pending.pop(id_, None)
        if answer and answer.sent:
            self._held.give(answer.held)
            if self._link:
                self._link.drop(id_)
            self._abandoned.append(id_)
            self._flush_soon()
        elif answer:
            # An unsent call is never sent, and leaves the outbox with the next flush.
            answer.parts = ()

    def _set_away(self, is_away: bool) -> None:
        self._said_away = is_away
        if not is_away:
            # It works on them from now on, also if it goes away again.
            for answer in self._pending.values():
                answer.waits = False
        self._update_away()

    def _quiet(self, intervals: int) -> None:
        """Judge an instance by the intervals in which it has sent nothing, of which it has one at most while busy."""
        # With only new calls it may not have known that it is busy.
        known_s = time.monotonic() - _MOST_QUIET * link.ALIVE_S
        oldest = next(iter(self._pending.values()), None)
        self._is_silent = intervals >= _MOST_QUIET and oldest is not None and oldest.asked_s < known_s
        self._update_away()

    def _update_away(self) -> None:
        self.is_away = self._said_away or self._is_silent
        if self.is_away and self._looking is None:
            self._look()

    def _look(self) -> None:
        """Find the calls that are late, as long as calls are pending.

        A call that was sent to stay at an instance that is away waits there without any work on it, whatever the net
        is, until the instance is back. So does every call at a silent one.
        """
        self._looking = None
        if not self._pending or not (self._hedges or self.is_away):
            return
        self._looking = self._loop.call_later(_LOOK_S, self._look)
        now_s = time.monotonic()
        before_s = now_s - (pace.LEAST_LATE_S if self.is_away else self._pace.late_s)
        # The oldest come first.
        late = list(itertools.takewhile(lambda each: each.asked_s <= before_s, self._pending.values()))
        for answer in late:
            # One that is still being sent, or whose answer arrives, tells of the link only.
            counts = self._is_silent or (answer.sent_s <= before_s and not answer.held)
            if counts and answer.hedge_s <= now_s and self._may_hedge(answer):
                self._be_slow(answer)

    def _may_hedge(self, answer: Answer) -> bool:
        if self._is_silent:
            return True
        # The time of a fetch says nothing about the instance.
        hedges = answer.waits or (self._hedges and not answer.flags & link.FETCH)
        return hedges and self._pace.take()

    def _be_slow(self, answer: Answer) -> None:
        again = answer.again()
        self._pending[answer.id] = again
        if not answer.sent:
            self._outbox[self._outbox.index(answer)] = again
        answer.set_exception(Slow(again))

    def _expire(self, id_: int) -> None:
        answer = self._pending[id_]
        self._abandon(id_)
        if not answer.done():
            answer.set_exception(TimeoutError())

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Send the waiting calls and cancellations, unless the instance reads too slowly."""
        self._flushing = False
        wire = self._link
        if wire is None or not wire.is_open:
            return
        while wire.writable and (self._outbox or self._abandoned):
            wire.write(self._parts(wire))
        wire.pump()

    def _parts(self, wire: InstanceLink) -> list[Buffer]:
        """Return waiting cancellations and calls as frames in parts; long ones go to the link."""
        parts: list[Buffer] = []
        if self._abandoned:
            parts.append(link.cancel_frame(self._abandoned[:_MOST_CANCELLED]))
            del self._abandoned[:_MOST_CANCELLED]
        now_s = time.monotonic()
        size = 0
        while self._outbox and size < _WRITE_BYTES:
            answer = self._outbox.popleft()
            if answer.id not in self._pending:
                continue
            answer.sent = True
            length = answer.length
            timeout_us = max(1, int((answer.deadline_s + _LATER_S - now_s) * 1e6))
            head = link.call_head(answer.id, timeout_us, answer.flags, answer.reqid, answer.traceparent, length)
            if length < link.LONG_BYTES:
                size += length
                parts.append(head)
                parts += answer.parts
            else:
                wire.send_long(answer.id, head, *answer.parts)
            answer.parts = ()
        return parts

    def _fail(self, reason: str) -> None:
        self._down = reason
        for answer in self._pending.values():
            self._held.give(answer.held)
            if not answer.done():
                # A long call is as good as unsent until its last piece has left: the instance begins nothing before.
                reached = answer.sent and answer.sent_s < answer.deadline_s
                answer.set_exception(TransportError(reason, reached=reached))
        self._pending.clear()
        self._outbox.clear()
        self._abandoned.clear()
