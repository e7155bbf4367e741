"""Copies some of an app's requests to a version in staging, and compares its answers with those that callers got.

A copy is made after the caller has its answer, and shares the request's bytes. It is dropped if there is any doubt
about room for it, asked of one instance only, and never asked again.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING

import structlog

from atserving.config import Shadow
from atserving.errors import ServingError
from atserving.held import HeldBytes
from atserving.v1 import registry_pb2
from gate import compare, responses
from gate.answers import Answer, TransportError
from gate.connection import EvaluatorConnection
from gate.endpoint import Endpoint, Kind
from gate.router import Route, Router

if TYPE_CHECKING:
    from gate.dispatch import CallContext, EvalResult, Task

log = structlog.get_logger()

MOST_COPIES = 64
"""How many copies are under way at once."""

MOST_BYTES = 32 << 20
"""How many bytes of requests and answers they hold."""

SUFFIX = ".shadow"
"""The end of a copy's id, after the request's own, in the logs of the instance that gets it."""

SLOWER = 1.2
"""A copy is slower if it takes so many times as long as the caller's own request."""

_SAMPLES = 20
# A line for each of a comparison would double the log.
_LOG_MS = 1000
# Longer answers are compared in a thread.
_SHORT_BYTES = 4096
_MOST_COMPARISONS = 1000
_REASON_CHARS = 200
# The upper bounds of the times are powers of this, in units of 0.1 ms.
_STEP, _UNIT_S = 1.1, 1e-4


@dataclass
class Comparison:
    """A version beside one other: since either had other content, or the shadow other settings."""

    app: str
    version: str
    digest: str
    baseline: str
    baseline_digest: str
    settings: str
    since: float = field(default_factory=time.time)
    equal: int = 0
    different: int = 0
    failed: int = 0
    slower: int = 0
    dropped: int = 0
    times: Counter[int] = field(default_factory=Counter)
    """How many copies took how long, by :func:`bucket`."""
    baseline_times: Counter[int] = field(default_factory=Counter)
    """The same of the requests that were copied."""
    seconds: float = 0.0
    baseline_seconds: float = 0.0
    logged_ms: int = 0
    """When a difference was last logged."""
    samples: deque[registry_pb2.Difference] = field(default_factory=lambda: deque(maxlen=_SAMPLES))

    def to_proto(self) -> registry_pb2.Comparison:
        return registry_pb2.Comparison(
            app=self.app,
            version=self.version,
            digest=self.digest,
            baseline=self.baseline,
            baseline_digest=self.baseline_digest,
            settings=self.settings,
            since_ms=round(self.since * 1000),
            equal=self.equal,
            different=self.different,
            failed=self.failed,
            slower=self.slower,
            dropped=self.dropped,
            times=self.times,
            baseline_times=self.baseline_times,
            samples=self.samples,
        )


def bucket(seconds: float) -> int:
    """Return the number of the bucket of a time; the upper bound of bucket n is 0.1 ms * 1.1 ** n."""
    return max(0, math.ceil(math.log(max(seconds, _UNIT_S) / _UNIT_S, _STEP)))


def upper_s(number: int) -> float:
    """Return the upper bound of a bucket, in seconds."""
    return float(_UNIT_S * _STEP**number)


class Shadows:
    """The copies of a gate, and what was found."""

    def __init__(self, router: Router[EvaluatorConnection], held: HeldBytes) -> None:
        self._router = router
        self._held = held
        self._copies = 0
        self._bytes = 0
        self._turns: dict[str, tuple[Shadow, int]] = {}
        self._found: dict[tuple[str, str, str, str, str, Shadow], Comparison] = {}
        self.changed = asyncio.Event()
        """Set when something was found."""

    def found(self) -> list[Comparison]:
        """Return all comparisons."""
        return list(self._found.values())

    def consider(
        self, task: Task, call: CallContext, route: Route, fetches: bool, result: EvalResult, took_s: float
    ) -> None:
        """Copy a request whose answer leaves now, if it is its turn; it has taken ``took_s``.

        The copy is made after the caller's answer.
        """
        shadow = route.shadow
        assert shadow
        known, count = self._turns.get(route.app, (shadow, 0))
        count = 1 if known is not shadow and known != shadow else count + 1
        self._turns[route.app] = shadow, count
        share = Fraction(repr(shadow.percent)) / 100
        if math.floor(count * share) > math.floor((count - 1) * share):
            loop = asyncio.get_running_loop()
            loop.call_soon(self._copy, task, call, route, shadow, fetches, result, took_s)

    def _copy(
        self,
        task: Task,
        call: CallContext,
        route: Route,
        shadow: Shadow,
        fetches: bool,
        result: EvalResult,
        took_s: float,
    ) -> None:
        found = self._comparison(route.app, shadow, result.version)
        if found is None:
            return
        self.changed.set()
        length = sum(map(len, task.body.parts)) if task.body else task.request.ByteSize()
        length += responses.size(result.response)
        kind = Kind(batched=True, fetches=fetches)
        endpoint = self._free(route.app, shadow.version, kind)
        if endpoint is None or not self._take(length):
            found.dropped += 1
            return
        endpoint.begin(kind)
        asked_s = time.monotonic()
        try:
            answer = endpoint.connection.ask(
                task.request,
                asked_s + route.timeout_s,
                f"{call.reqid}{SUFFIX}",
                # No caller waits for the copy, so it is no part of the caller's trace, unless it is slow or fails.
                call.traceparent and f"{call.traceparent[:-2]}00",
                task.body,
                batched=True,
                fetches=fetches,
            )
        except TransportError as error:
            endpoint.end(kind)
            self._give(length)
            self._fail(found, call.reqid, str(error))
            return
        answer.add_done_callback(
            partial(self._answered, found, shadow, call.reqid, result, took_s, asked_s, endpoint, kind, length)
        )

    def _free(self, app: str, version: str, kind: Kind) -> Endpoint[EvaluatorConnection] | None:
        """Return an instance that serves and is at most half full; None if there is none."""
        try:
            endpoint = self._router.pick(self._router.route(app, version), kind=kind)
        except ServingError:
            return None
        if endpoint.opened is None:
            self._router.warm(endpoint)
        return None if endpoint.is_away or 2 * endpoint.used(kind) >= endpoint.instance.capacity else endpoint

    def _take(self, length: int) -> bool:
        if self._copies == MOST_COPIES or self._bytes + length > MOST_BYTES:
            return False
        # As a large request, whatever it is: those leave a quarter to callers.
        if not self._held.take(length, large=True):
            return False
        self._copies += 1
        self._bytes += length
        return True

    def _give(self, length: int) -> None:
        self._copies -= 1
        self._bytes -= length
        self._held.give(length)

    def _answered(
        self,
        found: Comparison,
        shadow: Shadow,
        reqid: str,
        result: EvalResult,
        took_s: float,
        asked_s: float,
        endpoint: Endpoint[EvaluatorConnection],
        kind: Kind,
        length: int,
        answer: Answer,
    ) -> None:
        """Take note of how a copy has ended, and compare its answer."""
        copy_s = time.monotonic() - asked_s
        endpoint.end(kind)
        failure = None if answer.cancelled() else answer.exception()
        if answer.cancelled() or failure:
            self._give(length)
            reason = "no answer in time" if isinstance(failure, TimeoutError) else str(failure or "broken off")
            self._fail(found, reqid, reason)
            return
        response = answer.result()
        error = responses.error_of(response)
        size = responses.size(response)
        if (error and error.refused) or not self._held.take(size, large=True):
            self._give(length)
            found.dropped += 1
            self.changed.set()
            return
        self._bytes += size
        length += size
        if error:
            self._give(length)
            self._fail(found, reqid, f"{error.code} {error.message}")
            return
        found.times[bucket(copy_s)] += 1
        found.baseline_times[bucket(took_s)] += 1
        found.seconds += copy_s
        found.baseline_seconds += took_s
        found.slower += copy_s > SLOWER * took_s
        ours = result.response
        if max(responses.size(ours), size) <= _SHORT_BYTES:
            self._compared(found, reqid, length, compare.difference(ours, response, shadow))
        else:
            loop = asyncio.get_running_loop()
            comparing = loop.run_in_executor(None, compare.difference, ours, response, shadow)
            comparing.add_done_callback(lambda done: self._compared(found, reqid, length, done.result()))

    def _compared(self, found: Comparison, reqid: str, length: int, difference: str) -> None:
        self._give(length)
        self.changed.set()
        if difference:
            found.different += 1
            self._sample(found, reqid, difference, failed=False)
        else:
            found.equal += 1

    def _fail(self, found: Comparison, reqid: str, reason: str) -> None:
        self.changed.set()
        found.failed += 1
        self._sample(found, reqid, reason, failed=True)

    @staticmethod
    def _sample(found: Comparison, reqid: str, reason: str, *, failed: bool) -> None:
        sample = registry_pb2.Difference(reqid=reqid, reason=reason[:_REASON_CHARS], failed=failed)
        sample.time_ms = round(time.time() * 1000)
        found.samples.append(sample)
        if sample.time_ms < found.logged_ms + _LOG_MS:
            return
        found.logged_ms = sample.time_ms
        log.info(
            "shadow differs",
            reqid=reqid,
            app=found.app,
            version=found.version,
            baseline=found.baseline,
            failed=failed,
            reason=reason[:_REASON_CHARS],
        )

    def _comparison(self, app: str, shadow: Shadow, baseline: str) -> Comparison | None:
        """Return what is known of the versions with the content that they have now; None if one is gone."""
        digests = self._router.digest(app, shadow.version), self._router.digest(app, baseline)
        if not all(digests):
            return None
        key = (app, shadow.version, digests[0], baseline, digests[1], shadow)
        found = self._found.get(key)
        if found is None:
            # What began anew replaces what it was; and some bound must be.
            for old in [each for each in self._found if (each[0], each[1], each[3]) == (app, shadow.version, baseline)]:
                del self._found[old]
            while len(self._found) >= _MOST_COMPARISONS:
                del self._found[next(iter(self._found))]
            found = self._found[key] = Comparison(
                app, shadow.version, digests[0], baseline, digests[1], shadow.settings
            )
        return found
