"""The answer of an instance to one call, as a future."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

from atserving.wire import Buffer
from gate.record import Attempt
from gate.responses import Response


class TransportError(Exception):
    """The instance could not be reached, or the connection broke with the request in flight (``reached``)."""

    def __init__(self, message: str, reached: bool) -> None:
        super().__init__(message)
        self.reached = reached


class Slow(Exception):  # noqa: N818
    """The instance takes far longer than usual. The call goes on; ``answer`` is the future of its response."""

    def __init__(self, answer: Answer) -> None:
        super().__init__("the instance takes longer than usual")
        self.answer = answer


class Answer(asyncio.Future[Response]):
    """The response to a call. Cancelling it abandons the call."""

    __slots__ = (
        "abandon",
        "asked_s",
        "attempt",
        "deadline_s",
        "flags",
        "hedge_s",
        "held",
        "id",
        "length",
        "parts",
        "reqid",
        "sent",
        "sent_s",
        "traceparent",
        "waits",
    )

    id: int
    abandon: Callable[[int], None]
    asked_s: float
    attempt: Attempt | None
    """Its record, if there is one."""
    sent_s: float
    """When it was sent, on the monotonic clock. A short call: when it was asked. A long one: when its last piece left,
    and the deadline before."""
    hedge_s: float
    """Until then, on the monotonic clock, it is not :class:`Slow`."""
    deadline_s: float
    flags: int
    held: int
    reqid: bytes
    traceparent: bytes
    parts: Sequence[Buffer]
    length: int
    sent: bool
    waits: bool
    """Whether it waits at an instance that is away: nothing works on it there."""

    def cancel(self, msg: Any | None = None) -> bool:
        if super().cancel(msg):
            self.abandon(self.id)
            return True
        if not self.cancelled() and isinstance(slow := self.exception(), Slow):
            # Whoever waited will not take the call over.
            slow.answer.cancel()
        return False

    def again(self) -> Answer:
        """Return another future of the same response, which is not slow again."""
        answer = Answer(loop=self.get_loop())
        for name in Answer.__slots__:
            setattr(answer, name, getattr(self, name))
        answer.hedge_s = math.inf
        return answer
