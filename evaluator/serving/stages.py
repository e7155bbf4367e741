"""The stages of a request on the monotonic clock, as far as they are known. Pure, for the spans of traced requests."""

from __future__ import annotations

from typing import NamedTuple

from atserving import link
from evaluator.serving.report import Report
from evaluator.worker.progress import Running


class Stage(NamedTuple):
    """One stage, between two times of the monotonic clock, in seconds."""

    name: str
    """``queue``, ``decode``, ``forward`` or ``postprocess``. A request waits in two queues: for a thread that decodes
    it, and for an engine."""
    began_s: float
    ended_s: float
    is_whole: bool = True
    """Whether it has ended, or only the request has."""


def answered(
    entered_s: float, ended_s: float, reply: link.Reply, prepared_s: float, report: Report | None
) -> list[Stage]:
    """Return the stages of a request that the worker has answered.

    They are in order and between ``entered_s`` and ``ended_s``, whatever a script has written to its socket.
    """
    clock = _Clock(entered_s, ended_s)
    if not prepared_s:
        # It expired as it waited, or memory was short.
        return [clock.until("queue", ended_s)]
    stages = [
        clock.until("queue", prepared_s),
        clock.lasts("decode", reply.decode_us),
    ]
    if report and report.began_s and reply.batch_size:
        stages += [
            clock.until("queue", report.began_s),
            clock.lasts("forward", reply.forward_us),
            clock.lasts("postprocess", reply.postprocess_us),
        ]
    return stages


def unanswered(entered_s: float, ended_s: float, running: Running | None) -> list[Stage]:
    """Return the stages of a request that ended before the worker's answer. ``running``: what the worker does for it.

    The worker tells no more; a request that it runs has been prepared in its first queue.
    """
    clock = _Clock(entered_s, ended_s)
    if not running:
        return [clock.until("queue", ended_s)._replace(is_whole=False)]
    name = "decode" if running.preparing else "forward"
    return [clock.until("queue", running.since_s), clock.until(name, ended_s)._replace(is_whole=False)]


class _Clock:
    """Puts stages one after the other."""

    def __init__(self, began_s: float, ended_s: float) -> None:
        self._now_s, self._ended_s = began_s, ended_s

    def until(self, name: str, time_s: float) -> Stage:
        began_s = self._now_s
        # In this order a NaN loses.
        self._now_s = min(self._ended_s, max(began_s, time_s))
        return Stage(name, began_s, self._now_s)

    def lasts(self, name: str, microseconds: int) -> Stage:
        return self.until(name, self._now_s + microseconds / 1e6)
