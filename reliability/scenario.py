"""One scenario: callers, a fault or an attack in their midst, and what came of it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import aiohttp
import grpc.aio

from atserving.errors import StartError
from bench.measurement import quantiles_ms
from reliability import agreement
from reliability.memory import Peaks
from reliability.mesh import Mesh
from reliability.report import NO_LOSS, Allowance, Row
from reliability.traffic import CALLERS, Job, Outcome, Stream, Traffic
from reliability.truth import Truth

_WHOLE_S = 60.0
_PROBLEMS = (OSError, TimeoutError, StartError, aiohttp.ClientError, grpc.aio.AioRpcError)


@dataclass
class Stage:
    """Where a scenario acts."""

    mesh: Mesh
    truth: Truth
    scale: float
    """Shortens every time of a scenario; 1 is its full length."""
    notes: list[str] = field(default_factory=list)
    """The notes of the table, beside the callers' figures."""
    broken: set[str] = field(default_factory=set)
    """The processes that the scenario itself ends."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds * self.scale)

    def note(self, text: str) -> None:
        self.notes.append(" ".join(text.split()))


@dataclass(frozen=True)
class Scenario:
    """A fault or an attack. It acts after ``before_s`` of load, and the load goes on until ``seconds`` are over."""

    name: str
    act: Callable[[Stage], Awaitable[None]]
    streams: Sequence[Stream]
    seconds: float = 12.0
    before_s: float = 2.0
    broken_edge: int | None = None
    """The Envoy that is broken: its own callers have no balancer in front, and are counted apart."""
    others: Sequence[str] = ()
    """Groups beside the callers whose figures are noted."""
    agrees: bool = False
    """Whether to measure how long it takes after the fault until all have the same config."""
    allowed: Allowance = NO_LOSS
    """How many requests of the callers may fail at full length, and why."""


async def play(scenario: Scenario, mesh: Mesh, truth: Truth, scale: float = 1.0) -> Row:
    """Play a scenario, wait until the mesh is whole again, and return its row of the table."""
    stage = Stage(mesh, truth, scale)
    whole = True
    agreed_s: float | None = None
    job = Job(mesh.edges, mesh.files_url, truth, scenario.streams)
    peaks = Peaks(mesh.parts)
    async with peaks, Traffic(job) as traffic:
        began_s = time.monotonic()
        await stage.sleep(scenario.before_s)
        try:
            await scenario.act(stage)
        except _PROBLEMS as error:
            stage.note(f"the scenario itself failed: {error!r}")
            whole = False
        if scenario.agrees:
            ended_s = time.monotonic()
            if missing := await agreement.missing(mesh, _WHOLE_S):
                stage.note(f"without the same config after {_WHOLE_S:g} s: it waits for {missing}")
                whole = False
            agreed_s = time.monotonic() - ended_s
        await asyncio.sleep(max(0.0, began_s + scenario.seconds * scale - time.monotonic()))
        outcomes = await traffic.ended()
        if missing := await mesh.whole(_WHOLE_S):
            stage.note(f"not whole after {_WHOLE_S:g} s: it waits for {missing}")
            whole = False
    for name, count in peaks.restarts().items():
        if name not in stage.broken and name.removeprefix("worker of ") not in stage.broken:
            stage.note(f"{name} restarted ({count})")
    if scenario.broken_edge is not None:
        stage.note(_figures("the broken Envoy's own", [each for each in outcomes if each.edge == scenario.broken_edge]))
    for group in scenario.others:
        stage.note(_figures(group, [each for each in outcomes if each.group == group]))
    callers = [each for each in outcomes if each.group == CALLERS]
    return replace(_row(scenario, callers, peaks, stage.notes, whole), agreed_s=agreed_s)


def _row(scenario: Scenario, outcomes: Sequence[Outcome], peaks: Peaks, notes: Sequence[str], whole: bool) -> Row:
    ours = [each for each in outcomes if each.edge != scenario.broken_edge]
    apart = [each for each in outcomes if each.edge == scenario.broken_edge]
    failed = _failed(ours)
    return Row(
        name=scenario.name,
        sent=sum(len(each.took_s) for each in outcomes),
        answered=sum(len(each.took_s) for each in outcomes if not each.cause),
        failed=dict(failed),
        apart=_failed(apart).total(),
        worst_s=max((max(each.took_s) for each in ours), default=0.0),
        peak_mib=dict(peaks.mib()),
        notes=list(notes),
        whole=whole,
        allowed=scenario.allowed,
    )


def _failed(outcomes: Iterable[Outcome]) -> Counter[str]:
    failed: Counter[str] = Counter()
    for each in outcomes:
        if each.cause:
            failed[each.cause] += len(each.took_s)
    return failed


def _figures(group: str, outcomes: Sequence[Outcome]) -> str:
    """Return one line on a group beside the callers."""
    right = [took_s for each in outcomes if not each.cause for took_s in each.took_s]
    text = f"{group}: {len(right):,} of {sum(len(each.took_s) for each in outcomes):,} answered"
    if right:
        p50, p99 = quantiles_ms(right)
        text += f", p50 {p50:,.0f} ms, p99 {p99:,.0f} ms"
    causes = ", ".join(f"{count:,} x {cause}" for cause, count in _failed(outcomes).most_common(2))
    return f"{text}; {causes}" if causes else text
