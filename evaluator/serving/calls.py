"""The calls that a supervisor has taken."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from atserving import link
from atserving.errors import ServingError


class Taker(Protocol):
    """Takes the end of a call; one of these is called once, unless the call was cancelled."""

    def answered(self, reply: link.Reply) -> None:
        """Take the worker's reply, which may hold an error."""

    def failed(self, error: ServingError) -> None:
        """Take the error of a call that gets no reply."""


class SupervisedCall:
    """A call without a reply so far. Times are of the monotonic clock."""

    __slots__ = (
        "batched",
        "deadline_s",
        "deaths_s",
        "ended",
        "id",
        "late_s",
        "reqid",
        "request",
        "sent_bytes",
        "sent_s",
        "stays",
        "taker",
    )

    def __init__(
        self,
        id_: int,
        reqid: bytes,
        request: link.Buffer,
        deadline_s: float,
        late_s: float,
        taker: Taker,
        stays: bool,
        batched: bool = False,
    ) -> None:
        self.id = id_
        self.reqid = reqid
        self.request = request
        self.deadline_s = deadline_s
        self.late_s = late_s
        """When the app's timeout has passed, too. Only then it may count as stuck: a caller with a short deadline, or
        one who leaves, must not cost others their worker."""
        self.taker: Taker | None = taker
        """None: the caller has left."""
        self.stays = stays
        """Whether it waits here while the instance is away, since its gate has no other."""
        self.batched = batched
        """Whether it is a task of a batch."""
        self.sent_s = 0.0
        """When it was sent to the process that runs; 0: it waits here."""
        self.sent_bytes = 0
        """The bytes of the request that was sent, which the worker keeps even if the caller has left."""
        self.deaths_s: tuple[float, ...] = ()
        """When worker processes died that worked on it, or may have."""
        self.ended: asyncio.Event | None = None
        """Of a suspect: set when it has its outcome, or its caller has left."""

    def release(self) -> Taker | None:
        """Let go of the request of a call that has ended, and return its taker, once."""
        taker, self.taker, self.request = self.taker, None, b""
        return taker

    def end(self) -> None:
        """Let whoever waits for the end of a suspect go on."""
        if self.ended:
            self.ended.set()


class Outcome:
    """Takes the outcome of a call into a future."""

    def __init__(self) -> None:
        self.reply: asyncio.Future[link.Reply] = asyncio.get_running_loop().create_future()

    def answered(self, reply: link.Reply) -> None:
        if not self.reply.done():
            self.reply.set_result(reply)

    def failed(self, error: ServingError) -> None:
        if not self.reply.done():
            self.reply.set_exception(error)


async def either(event: asyncio.Event, ended: asyncio.Future[None]) -> None:
    """Return once the event is set or the process has ended."""
    waiting = asyncio.create_task(event.wait())
    try:
        ends: list[asyncio.Future[Any]] = [waiting, ended]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
