"""The table of the scenarios."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.measurement import markdown_table

_KINDS = ("envoy", "gate", "front", "worker", "registry", "etcd")
_HEADER = ("scenario", "sent", "answered", "failed", "slowest", "agreed", "peak MiB: " + ", ".join(_KINDS), "notes")


@dataclass(frozen=True)
class Allowance:
    """How many requests of the callers a scenario may lose, and why."""

    requests: int = 0
    why: str = ""


NO_LOSS = Allowance()


@dataclass(frozen=True)
class Row:
    """The outcome of a scenario. The figures are those of the callers who may lose nothing, but for the allowance."""

    name: str
    sent: int
    answered: int
    failed: Mapping[str, int]
    """How many requests failed, by cause."""
    apart: int
    """How many failed at the Envoy that the scenario broke."""
    worst_s: float
    peak_mib: Mapping[str, int]
    """The largest peak of a process of each kind."""
    notes: Sequence[str] = field(default_factory=list)
    agreed_s: float | None = None
    """The time from the end of the fault until all have the same config, and a new write."""
    whole: bool = True
    """Whether the scenario could act, and the mesh was whole again afterwards."""
    allowed: Allowance = NO_LOSS

    @property
    def lost(self) -> int:
        """How many requests failed that had a whole way to go."""
        return sum(self.failed.values())

    @property
    def complaint(self) -> str:
        """The faults of the outcome; empty if it has none."""
        if not self.whole:
            return f"{self.name}: it failed, see its notes"
        if self.lost > self.allowed.requests:
            allowed = f", of which {self.allowed.requests:,} are allowed" if self.allowed.requests else ""
            return f"{self.name}: {self.lost:,} requests lost{allowed}"
        return ""

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the row."""
        failed = [f"{count:,} x {cause}" for cause, count in sorted(self.failed.items(), key=lambda each: -each[1])]
        if self.apart:
            failed.append(f"apart: {self.apart:,} of the broken Envoy's own")
        if self.allowed.requests:
            failed = [*(failed or ["0"]), f"allowed: {self.allowed.requests:,}, {self.allowed.why}"]
        return (
            self.name,
            f"{self.sent:,}",
            f"{self.answered:,}",
            "; ".join(failed) or "0",
            f"{self.worst_s:.2g} s",
            "" if self.agreed_s is None else f"{self.agreed_s:.2g} s",
            ", ".join(str(self.peak_mib.get(kind, 0)) for kind in _KINDS),
            "; ".join(self.notes),
        )

    def __str__(self) -> str:
        name, sent, answered, failed, worst, agreed, peaks, notes = self.cells()
        text = f"{name}\n    {answered} of {sent} answered, failed: {failed}; slowest {worst}; MiB {peaks}"
        if agreed:
            text += f"; the same config after {agreed}"
        return f"{text}\n    {notes}" if notes else text


def markdown(rows: Iterable[Row], before: Mapping[str, str]) -> str:
    """Return the rows as a table, with what was measured ``before`` by the scenario's name."""
    lines = [
        tuple(cell.replace("|", "\\|") for cell in (*row.cells()[:-1], before.get(row.name, ""), row.cells()[-1]))
        for row in rows
    ]
    return markdown_table((*_HEADER[:-1], "before", _HEADER[-1]), lines)
