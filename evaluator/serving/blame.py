"""Decides which calls caused the death of a worker process. Pure, so that tests need no process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Call(Protocol):
    """A call in flight; from ``late_s`` of the monotonic clock on it may count as stuck."""

    late_s: float


CallT = TypeVar("CallT", bound=Call)


@dataclass(frozen=True)
class Judgement(Generic[CallT]):
    """The calls to fail, and the calls to retry alone."""

    late: Sequence[CallT]
    """They were stuck."""
    guilty: Sequence[CallT]
    """They crashed the process."""
    suspects: Sequence[CallT]
    """One of them may have crashed the process; each runs again alone, in this order."""


def judge(
    at_work: Sequence[CallT], suspects: Sequence[CallT], *, stuck: bool, killed: bool, now_s: float
) -> Judgement[CallT]:
    """Judge the calls that the process worked on when it died.

    ``suspects`` are those of an earlier death. ``stuck``: the supervisor killed the process for the calls in
    ``at_work``. ``killed``: SIGKILL ended the process, which may also come from a machine without free memory; then a
    single call is guilty only if it was a suspect before.
    """
    late = [each for each in at_work if stuck and (each.late_s <= now_s or len(at_work) == 1)]
    alone = len(at_work) == 1 and not late
    guilty = list(at_work) if alone and (at_work[0] in suspects or not killed) else []
    found = [*suspects, *(each for each in at_work if each not in late and each not in suspects)]
    return Judgement(late, guilty, [each for each in found if each not in guilty and each not in late])
