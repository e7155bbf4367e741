"""Judges the calls at one instance: how long is too long, and how many may another instance be asked for, too."""

from __future__ import annotations

LEAST_LATE_S = 0.5
"""A call that is younger is never late."""

_FACTOR = 5.0
# How much of the difference one answer counts that took more, or less, than usual: about one in sixteen takes more.
_UP, _DOWN = 1 / 4, 1 / 64
# One hedge for ten answers; so many at the start, and so many saved up at most.
_EACH, _AT_START, _MOST = 0.1, 4.0, 32.0


class Pace:
    """The pace of one instance, learned from its answers, and the budget of hedges."""

    def __init__(self) -> None:
        self._usual_s = 0.0
        self._budget = _AT_START

    def learn(self, took_s: float) -> None:
        """Take an answer into account."""
        more_s = took_s - self._usual_s
        self._usual_s += more_s * (_UP if more_s > 0 else _DOWN)
        if self._budget < _MOST:
            self._budget += _EACH

    @property
    def late_s(self) -> float:
        """The age from which a call is late: five times the usual, which is a high estimate."""
        return max(LEAST_LATE_S, _FACTOR * self._usual_s)

    def take(self) -> bool:
        """Take one hedge from the budget, and return whether there was one."""
        if self._budget < 1:
            return False
        self._budget -= 1
        return True

    def give_back(self) -> None:
        """Return a hedge that was not used."""
        self._budget += 1
