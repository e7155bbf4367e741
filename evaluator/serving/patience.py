"""Decides whether a call in the worker is stuck, and whether the worker stands still."""

from __future__ import annotations

from collections.abc import Iterable

from evaluator.worker.progress import Running

LEAST_S, MOST_S = 1.0, 20.0
_FACTOR = 10.0

STILL_S = 1.0
"""A worker that has answered nothing for so long may stand still."""
_STILL_FACTOR = 4.0

# The longest is half forgotten after 44 shorter ones.
_MEMORY = 64


class Patience:
    """How long a call may run before it counts as stuck, once its deadline has passed.

    A deadline alone does not make a call stuck: a caller with a short deadline must not kill a script that works. So a
    call has ten times as long as the longest of the recent calls, but at least 1 s and at most 20 s more than that.
    """

    def __init__(self, timeout_s: float) -> None:
        """After ``timeout_s`` a call is stuck in any case; it may be infinite."""
        self._timeout_s = timeout_s
        self._longest_prepare_s = self._longest_infer_s = 0.0

    def learn_prepare(self, took_s: float) -> None:
        """Take the duration of a call's preparation into account."""
        self._longest_prepare_s = _longest(self._longest_prepare_s, took_s)

    def learn_infer(self, took_s: float) -> None:
        """Take the duration of a batch into account."""
        self._longest_infer_s = _longest(self._longest_infer_s, took_s)

    def is_over(self, running: Running, deadlines_s: Iterable[float], now_s: float) -> bool:
        """Return whether ``running``, whose calls have these deadlines, is stuck."""
        took_s = now_s - running.since_s
        if took_s > self._timeout_s:
            return True
        longest_s = self._longest_prepare_s if running.preparing else self._longest_infer_s
        patience_s = max(LEAST_S, min(_FACTOR * longest_s, longest_s + MOST_S))
        return took_s > patience_s and any(deadline_s <= now_s for deadline_s in deadlines_s)

    def still_s(self, batch_size: int) -> float:
        """Return how long a worker with calls may answer nothing until it counts as standing still.

        That is four times as long as a batch takes at most, but at least 1 s.
        """
        return max(STILL_S, _STILL_FACTOR * (batch_size * self._longest_prepare_s + self._longest_infer_s))


class Standstill:
    """Measures for how long nothing moves, in time in which this process itself ran: it may have stood still, too."""

    def __init__(self, longest_step_s: float) -> None:
        """A time between two looks counts as ``longest_step_s`` at most."""
        self._longest_step_s = longest_step_s
        self._before_s = self._still_s = 0.0
        self._seen: object = None

    def look(self, seen: object, now_s: float) -> float:
        """Return for how long ``seen`` has been the same; None always moves."""
        step_s = min(now_s - self._before_s, self._longest_step_s)
        self._before_s = now_s
        self._still_s = self._still_s + step_s if seen is not None and seen == self._seen else 0.0
        self._seen = seen
        return self._still_s


def _longest(before_s: float, took_s: float) -> float:
    return max(took_s, before_s - (before_s - took_s) / _MEMORY)
