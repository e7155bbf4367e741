"""Measure what the processes of a server use while callers load it, and whether others disturbed it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from bench import callers, machine

GENERATOR = "load generator"
_TRIES = 3


@dataclass(frozen=True)
class Measured:
    """What the callers saw, what each process used (the load generator too), and others' share of the cores."""

    load: callers.Load
    used: Mapping[str, machine.Usage]
    others: float

    def cpu_us(self) -> dict[str, float]:
        """Return the CPU time for each answer, in microseconds by process."""
        return {name: round(used.cpu_s / self.load.answers * 1e6, 1) for name, used in self.used.items()}


def busiest(cpu_us: Mapping[str, float]) -> list[str]:
    """Return the processes with more than a hundredth of the CPU time, those with the most first."""
    least_us = sum(cpu_us.values()) / 100
    return sorted((name for name in cpu_us if cpu_us[name] > least_us), key=lambda name: -cpu_us[name])


def measure(job: callers.Job, processes: Mapping[str, Iterable[int]]) -> Measured:
    """Load a server, whose process ids are given by name. Raises OSError if it breaks a connection."""
    with callers.Running(job) as running:
        groups = {**processes, GENERATOR: [running.pid]}
        running.begun()
        began, before = machine.Moment.now(), machine.usage(groups)
        load = running.ended()
        others, after = machine.Moment.now().others_since(began), machine.usage(groups)
    return Measured(load, {name: after[name].since(before[name]) for name in groups}, others)


class _Disturbed(Protocol):
    @property
    def others(self) -> float:
        """How many cores processes outside of the benchmark used, on average."""


_Row = TypeVar("_Row", bound=_Disturbed)


def undisturbed(measure: Callable[[], _Row], until_s: float = math.inf) -> tuple[_Row, int]:
    """Measure again while other processes disturb it, three times at most, and not once ``time.monotonic`` is there.

    Return the least disturbed row, and how many were measured.
    """
    rows = [measure()]
    while rows[-1].others > machine.BUSY_CORES and len(rows) < _TRIES and time.monotonic() < until_s:
        rows.append(measure())
    return min(rows, key=lambda row: row.others), len(rows)
