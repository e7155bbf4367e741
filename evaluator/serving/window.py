"""The worker's in-flight window: which calls wait, and how many of them the worker may get now."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Container, Iterable

from evaluator.serving.calls import SupervisedCall
from evaluator.worker.plan import Plan

# The calls of one write.
_WRITE_BYTES = 1 << 20

# Each thread of the worker has a large call at work, and a part of the next.
_THREAD_BYTES = 16 << 20

# A few cancelled calls in the queue cost less than to remove them.
_FEW = 64


class Window:
    """The calls that wait, and a count of those in the worker.

    The worker gets only as many calls as it can use, and bytes for each of its threads: it holds those of a call until
    its reply, even if the caller has left. One call always goes, however large it is.
    """

    def __init__(self) -> None:
        self.waiting: deque[SupervisedCall] = deque()
        self.sent = 0
        """How many calls are in the worker."""
        self._sent_bytes = 0

    def next(self, plan: Plan, calls: Container[int]) -> list[SupervisedCall]:
        """Return the next calls to write together, of those whose ids are in ``calls``; none, if there is no room."""
        threads = plan.engines + plan.preparers
        room = 2 * plan.batch_size * plan.engines + plan.preparers - self.sent
        room_bytes = min(threads * _THREAD_BYTES - self._sent_bytes, _WRITE_BYTES)
        size = 0
        following: list[SupervisedCall] = []
        while self.waiting and len(following) < room and size < room_bytes:
            one = self.waiting.popleft()
            if one.id in calls:
                following.append(one)
                size += len(one.request)
        return following

    def enter(self, one: SupervisedCall, now_s: float) -> None:
        """Count a call that is sent now."""
        one.sent_s = now_s
        one.sent_bytes = len(one.request)
        self.sent += 1
        self._sent_bytes += one.sent_bytes

    def leave(self, one: SupervisedCall) -> None:
        """Count a call no more, which has its reply."""
        if one.sent_s:
            self.sent -= 1
            self._sent_bytes -= one.sent_bytes

    def forget(self, calls: Collection[int]) -> None:
        """Remove what waits and is not of ``calls``, by their ids, once it is much."""
        if len(self.waiting) > 2 * len(calls) + _FEW:
            self.waiting = deque(one for one in self.waiting if one.id in calls)

    def restart(self, waiting: Iterable[SupervisedCall]) -> None:
        """Begin anew with a worker that has no calls."""
        self.waiting = deque(waiting)
        self.sent = self._sent_bytes = 0
