"""Rounds of measurements: each server in turn, with each net and number of callers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench import machine, under_load
from bench.bare_loop import BareLoop, Setting
from bench.peers.servers import Case, Server
from bench.peers.settings import FASTAPI, FASTAPI_PROCESSES, MOSEC
from bench.picture_net import PictureNet
from bench.under_load import GENERATOR, busiest, undisturbed
from bench.workload import WORKLOADS

OURS, BARE_LOOP = "ours", "bare_loop"
NETS: Mapping[str, str] = {"tiny": "digits", "mobilenet": "mobilenet"}
"""The nets, with the names of their workloads."""


@dataclass(frozen=True)
class Plan:
    """A plan of a run: for each net and number of callers the servers, and how long and often each is measured."""

    cases: tuple[tuple[str, int, tuple[str, ...]], ...]
    seconds: float
    rounds: int
    budget_s: float
    """A round but the first that would end later, counted from the start of the run, is left out."""

    @property
    def nets(self) -> list[str]:
        return list(dict.fromkeys(net for net, _, _ in self.cases))

    def servers(self, net: str) -> list[str]:
        """Return the servers that run a net."""
        return list(dict.fromkeys(server for each, _, servers in self.cases if each == net for server in servers))


SHORT = Plan(
    (
        ("tiny", 1, (OURS, FASTAPI)),
        ("tiny", 32, (OURS, MOSEC, FASTAPI, FASTAPI_PROCESSES)),
        ("mobilenet", 32, (OURS, MOSEC, BARE_LOOP)),
    ),
    seconds=0.8,
    rounds=3,
    budget_s=43,
)
FULL = Plan(
    # One caller would wait for a batch of the bare loop.
    tuple(
        (net, callers, (OURS, MOSEC, FASTAPI, FASTAPI_PROCESSES, BARE_LOOP)[: None if callers > 1 else 3])
        for net in NETS
        for callers in (1, 8, 32, 64)
    ),
    seconds=3.0,
    rounds=5,
    budget_s=3600,
)


@dataclass(frozen=True)
class Row:
    """One measurement. CPU is in microseconds per request, by process; p50 and p99 are of a batch in the bare loop."""

    net: str
    callers: int
    server: str
    per_s: float
    p50_ms: float
    p99_ms: float
    refused: int
    wrong: int
    cpu_us: dict[str, float]
    others: float
    """How many cores processes outside of the benchmark used meanwhile."""

    @property
    def server_cpu_us(self) -> float:
        """The CPU of everything but the load generator."""
        return sum(used for name, used in self.cpu_us.items() if name != GENERATOR)

    def __str__(self) -> str:
        cpu = ", ".join(f"{name} {self.cpu_us[name]:,.0f}" for name in busiest(self.cpu_us))
        return (
            f"{self.net:10}{self.callers:4} {self.server:10}{self.per_s:9,.0f}/s  p50 {self.p50_ms:8.2f}  "
            f"p99 {self.p99_ms:8.2f} ms  refused {self.refused}  wrong {self.wrong}  others {self.others:.2f}  "
            f"CPU us {cpu}"
        )


def prepare(net: str, folder: Path) -> tuple[Case, BareLoop]:
    """Convert a net, and run it once to know the right answer."""
    workload = WORKLOADS[NETS[net]](folder)
    loop = BareLoop(workload, folder)
    return Case(net, workload, loop.file, PictureNet(loop.file).answer(workload.image)), loop


@dataclass
class Bench:
    """All that is measured, and the rows so far."""

    plan: Plan
    began_s: float
    """``time.monotonic()`` at the start of the run."""
    servers: Mapping[tuple[str, str], Server]
    """By net and name."""
    loops: Mapping[str, tuple[BareLoop, Setting]]
    rounds: list[list[Row]] = field(default_factory=list)
    repeated: int = 0
    """How many rows were measured again as other processes disturbed them."""

    def run(self) -> None:
        """Measure all rounds for which there is time. Each second one goes backwards."""
        for number in range(self.plan.rounds):
            began_s = time.monotonic()
            self._round(-1 if number % 2 else 1)
            now_s = time.monotonic()
            if 2 * now_s - began_s > self._until_s:
                break

    @property
    def _until_s(self) -> float:
        return self.began_s + self.plan.budget_s

    def _round(self, step: int) -> None:
        rows: list[Row] = []
        self.rounds.append(rows)
        for net, callers, servers in self.plan.cases:
            for server in servers[::step]:
                row, tries = undisturbed(partial(self._measure, net, callers, server), self._until_s)
                self.repeated += tries - 1
                print(row, flush=True)
                rows.append(row)

    def _measure(self, net: str, callers: int, server: str) -> Row:
        if server == BARE_LOOP:
            return self._measure_bare(net, callers)
        chosen = self.servers[net, server]
        seen = under_load.measure(chosen.job(callers, self.plan.seconds), chosen.processes())
        load = seen.load
        times = load.per_s, load.p50_ms, load.p99_ms
        return Row(net, callers, server, *times, load.refused, load.wrong, seen.cpu_us(), seen.others)

    def _measure_bare(self, net: str, callers: int) -> Row:
        loop, setting = self.loops[net]
        began = machine.Moment.now()
        row = loop.measure(setting, self.plan.seconds, decodes=True)
        others = machine.Moment.now().others_since(began)
        cpu_us = {name: used * 1e3 for name, used in row.cpu_ms.items()}
        return Row(net, callers, BARE_LOOP, row.per_s, row.p50_ms, row.p99_ms, 0, 0, cpu_us, others)
