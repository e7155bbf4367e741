"""Asks instances for one request until one takes it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import structlog

from atserving.errors import ResourceExhausted, ServingError, Unavailable
from atserving.telemetry import trace_id
from atserving.v1 import evaluator_pb2
from gate.admission import admit
from gate.answers import Answer, Slow, TransportError
from gate.connection import EvaluatorConnection
from gate.endpoint import Endpoint, Kind
from gate.responses import Response, error_of
from gate.router import Route, Router

if TYPE_CHECKING:
    from gate.dispatch import CallContext, Task
    from gate.request_counts import AppCounts

log = structlog.get_logger()

MAX_LOST = 2
"""How many instances may be lost under one request. An eval has no side effects, so the gate may retry it; but a
request that crashes instances must not reach all of them."""

# How long a request waits for links that broke, and how often it looks: a gate that stood still has lost all at once.
_RECONNECT_S, _RECONNECT_STEP_S = 1.0, 0.1

# How often a request looks that waits for an instance: for instances that are registered and not reached, and, once it
# has waited, for room in them.
_UNREACHED_STEP_S, _FULL_STEP_S = 1.0, (0.05, 0.15)


class Attempts:
    """The attempts for one request.

    1. One instance after another is asked, until one takes the request.
    2. An instance that is away hands the request back. If no other takes it, the request stays there until the
       instance is back.
    3. If an instance is far slower than usual, one other that has room is asked, too: a hedge. The first answer counts,
       and the other call is cancelled.
    """

    __slots__ = (
        "_app_counts",
        "_broken_s",
        "_call",
        "_cause",
        "_deadline_s",
        "_handed_back",
        "_key",
        "_kind",
        "_lost",
        "_record",
        "_refusal",
        "_route",
        "_router",
        "_stays",
        "_task",
        "_tried",
        "_turn",
        "_wait_until_s",
    )

    def __init__(
        self,
        router: Router[EvaluatorConnection],
        task: Task,
        call: CallContext,
        route: Route,
        kind: Kind,
        key: bytes,
        deadline_s: float,
        counts: AppCounts,
    ) -> None:
        self._router = router
        self._task = task
        self._call = call
        self._route = route
        self._kind = kind
        self._key = key
        self._deadline_s = deadline_s
        self._app_counts = counts
        self._record = call.record
        # Why there is one more attempt.
        self._cause = ""
        self._tried: list[Endpoint[EvaluatorConnection]] = []
        self._turn = ""
        self._handed_back: list[Endpoint[EvaluatorConnection]] = []
        self._stays = False
        self._lost = 0
        self._broken_s: float | None = None
        self._refusal: ServingError | None = None
        # None unless it has found no ready instance.
        self._wait_until_s: float | None = None

    async def run(self) -> tuple[Response, str]:
        """Return a response and the version that gave it. Raises a ServingError.

        Raises TimeoutError at the deadline, with the version of the instance that was asked last.
        """
        while time.monotonic() < self._deadline_s:
            if self._tried:
                # The config may have changed since: a retry follows a promotion.
                self._route = self._router.route(self._task.app, self._task.version)
            try:
                endpoint = self._router.pick(self._route, self._tried, self._kind, self._key, self._turn)
            except (ResourceExhausted, Unavailable) as none_free:
                await self._try_again(none_free)
                continue
            if endpoint.opened is None:
                self._router.warm(endpoint)
            self._picked(endpoint)
            self._turn = self._turn or endpoint.instance.version
            try:
                with endpoint.hold(self._kind):
                    try:
                        response = await self._ask(endpoint, hedges=True)
                    except Slow as slow:
                        endpoint, answer = await self._hedge(endpoint, slow.answer)
                        response = answer.result()
            except TransportError as broken:
                self._failed(endpoint, broken)
                continue
            except TimeoutError:
                if self._record:
                    self._record.failed(endpoint.instance, "timeout")
                raise TimeoutError(endpoint.instance.version) from None
            if (error := error_of(response)) is None:
                if self._refusal:
                    self._served_by(endpoint.instance.version)
                if self._route.split:
                    self._app_counts.of(endpoint.instance.version).by_turn += 1
                return response, endpoint.instance.version
            self._refused(endpoint, error)
        raise TimeoutError

    def _picked(self, endpoint: Endpoint[EvaluatorConnection]) -> None:
        self._tried.append(endpoint)
        self._app_counts.picked(endpoint.instance.version, endpoint.instance.id)
        if self._record:
            self._record.ask(endpoint.instance, self._cause, len(self._tried) - 1)
        if self._cause:
            self._app_counts.retries[self._cause] += 1
            self._cause = ""

    def _ask(self, endpoint: Endpoint[EvaluatorConnection], *, hedges: bool) -> Answer:
        call, connection, record = self._call, endpoint.connection, self._record
        return connection.ask(
            self._task.request,
            self._deadline_s,
            call.reqid,
            record.traceparent(call.traceparent) if record else call.traceparent,
            self._task.body,
            stays=self._stays or connection.is_away,
            hedges=hedges,
            batched=self._kind.batched,
            fetches=self._kind.fetches,
            attempt=record.attempts[-1] if record else None,
        )

    async def _try_again(self, none_free: ServingError) -> None:
        """Return if it is worth to try again although no instance is left. Raises the reason otherwise."""
        if self._handed_back:
            # They are away for a moment only, and take what stays there.
            self._tried = [each for each in self._tried if each not in self._handed_back]
            self._handed_back.clear()
            self._stays = True
            return
        is_full = isinstance(self._refusal, ResourceExhausted) or isinstance(none_free, ResourceExhausted)
        if is_full and self._wait_until_s is not None and await self._wait_for_room(self._wait_until_s):
            return
        # If the ready instances refused because they are full, that is the reason to give.
        if isinstance(self._refusal, ResourceExhausted):
            self._refusal.refusal = "full"
            raise self._refusal from None
        if isinstance(none_free, ResourceExhausted):
            raise none_free from None
        if self._broken_s is None or time.monotonic() - self._broken_s > _RECONNECT_S:
            await self._wait_for_instance(none_free)
            return
        await asyncio.sleep(_RECONNECT_STEP_S)
        self._tried.clear()

    async def _wait_for_room(self, until_s: float) -> bool:
        """Wait a moment; return whether there was time for it. Those that waited all come to an instance at once."""
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            return False
        step_s = random.uniform(*_FULL_STEP_S)  # noqa: S311 - they take turns
        with self._known_to_wait():
            await asyncio.sleep(min(step_s, left_s))
        if time.monotonic() >= until_s:
            return False
        self._begin_again()
        return True

    async def _wait_for_instance(self, unready: ServingError) -> None:
        """Wait until an instance may be ready. Raises ``unready`` if the request is not to wait, or not any more."""
        route, waiting = self._route, self._router.waiting
        wanted = [self._app_counts.of(version) for version in route.versions]
        if self._wait_until_s is None:
            for each in wanted:
                each.without_instance += 1
        until_s = self._wait_until_s = min(self._call.started + route.wait_s, self._deadline_s)
        if not wanted or not route.wait_s:
            raise unready from None
        self._check_wait(until_s, unready)
        size = self._task.size()
        if not waiting.has_room(route.app, size):
            raise _because(unready, "too many requests wait for one") from None
        for each in wanted:
            each.waiting += 1
        try:
            left_s = until_s - time.monotonic()
            with self._known_to_wait():
                await waiting.wait(route.app, size, min(left_s, _UNREACHED_STEP_S) if self._tried else left_s)
        finally:
            for each in wanted:
                each.waiting -= 1
        self._check_wait(until_s, unready)
        self._begin_again()

    def _check_wait(self, until_s: float, unready: ServingError) -> None:
        if time.monotonic() >= until_s:
            waited_s = round(time.monotonic() - self._call.started, 1)
            raise _because(unready, f"the request has waited {waited_s} s") from None

    @contextmanager
    def _known_to_wait(self) -> Iterator[None]:
        """Let the batch of the request know that it waits, during the block."""
        if (waits := self._call.waits) is None:
            yield
            return
        key = self._task.app, self._task.version
        waits[key] += 1
        try:
            yield
        finally:
            waits[key] -= 1
            if not waits[key]:
                del waits[key]

    def _begin_again(self) -> None:
        """Forget which instances were asked, and that they are full; the config may have changed.

        Raises NotFound if the version is gone, and the refusal of a caller who may no longer call the app.
        """
        self._tried.clear()
        self._refusal = None
        route = self._route = self._router.route(self._task.app, self._task.version)
        admit(self._call.caller, route.app, route.metadata, route.default_metadata)

    def _ids(self) -> dict[str, str | None]:
        """Return the fields by which a line is found with the others of its request."""
        return {"reqid": self._call.reqid, "trace_id": trace_id(self._call.traceparent)}

    def _failed(self, endpoint: Endpoint[EvaluatorConnection], error: TransportError) -> None:
        """Take note of an instance that could not be reached, or was lost. Raises Unavailable after too many."""
        self._router.failed(endpoint)
        if self._broken_s is None or error.reached:
            log.warning("instance lost", **self._ids(), instance=endpoint.instance.id, reason=str(error))
        self._broken_s = self._broken_s or time.monotonic()
        self._lost += error.reached
        self._cause = "lost" if error.reached else "unreachable"
        if self._record:
            self._record.failed(endpoint.instance, self._cause)
        if self._lost == MAX_LOST:
            raise Unavailable(
                f"{self._lost} instances of app {self._task.app!r} were lost under this request",
                version=endpoint.instance.version,
            ) from None

    def _refused(self, endpoint: Endpoint[EvaluatorConnection], error: evaluator_pb2.Error) -> None:
        """Take note of an instance that refused the request. Raises any other error of its."""
        refusal = ServingError.from_proto(error)
        refusal.version = endpoint.instance.version
        if not refusal.refused:
            raise refusal
        if refusal.retry_after_s and refusal.status == Unavailable.status and not self._stays:
            self._handed_back.append(endpoint)
            self._turned_away(endpoint, "away")
            return
        self._refusal = refusal
        is_full = refusal.status == ResourceExhausted.status
        self._turned_away(endpoint, "full" if is_full else "refused")
        self._router.refused(endpoint, self._kind, refusal.retry_after_s or 0.0 if is_full else 0.0)

    def _turned_away(self, endpoint: Endpoint[EvaluatorConnection], cause: str) -> None:
        """Keep why an instance did not take the request."""
        self._cause = cause
        if self._record:
            self._record.failed(endpoint.instance, cause)

    def _served_by(self, version: str) -> None:
        """Give the turn back to the version that had it, if another one serves because its instances are full."""
        full = isinstance(self._refusal, ResourceExhausted)
        if full and version != self._turn and not self._key and self._route.split:
            self._route.split.move(self._turn, version)

    async def _hedge(
        self, endpoint: Endpoint[EvaluatorConnection], first: Answer
    ) -> tuple[Endpoint[EvaluatorConnection], Answer]:
        """Ask one other instance, too, once one has room. Return the answer that counts, and who gave it."""
        while (other := self._router.spare(self._route, self._tried, self._kind, self._key)) is None:
            endpoint.connection.hedge_later(first)
            try:
                await first
            except Slow as slow:
                first = slow.answer
                continue
            return endpoint, first
        self._cause = "hedge"
        self._picked(other)
        log.info("request hedged", **self._ids(), instance=endpoint.instance.id, other=other.instance.id)
        running = {first: endpoint}
        try:
            try:
                second = self._ask(other, hedges=False)
            except TransportError as error:
                self._failed(other, error)
            else:
                running[second] = other
                held = ExitStack()
                held.enter_context(other.hold(self._kind))
                second.add_done_callback(lambda _: held.close())
            return await self._first_of(running)
        finally:
            for each in running:
                each.cancel()

    async def _first_of(
        self, running: dict[Answer, Endpoint[EvaluatorConnection]]
    ) -> tuple[Endpoint[EvaluatorConnection], Answer]:
        """Return the first answer that is no refusal and no failure of the transport, or else the last."""
        while True:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for answer in done:
                endpoint = running.pop(answer)
                if not running or self._counts(endpoint, answer):
                    return endpoint, answer

    def _counts(self, endpoint: Endpoint[EvaluatorConnection], answer: Answer) -> bool:
        failure = answer.exception()
        if isinstance(failure, TransportError):
            self._failed(endpoint, failure)
            return False
        if failure is None and (error := error_of(answer.result())) and error.refused:
            self._refused(endpoint, error)
            return False
        return True


def _because(unready: ServingError, why: str) -> Unavailable:
    """Return the error of a request that found no ready instance, with a further reason."""
    return Unavailable(f"{unready.message}; {why}", retry_after_s=unready.retry_after_s, refusal=unready.refusal)
