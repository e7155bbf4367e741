"""The figures of one measurement, and tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measurement. CPU is in milliseconds per image, by process; p50 and p99 are of a batch in the bare loops."""

    net: str
    what: str
    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: dict[str, float]
    errors: int = 0

    def __str__(self) -> str:
        cpu = ", ".join(f"{name} {value:g}" for name, value in self.cpu_ms.items())
        return f"{self.what:48}{self.per_s:9.0f}/s  p50 {self.p50_ms:8.2f}  p99 {self.p99_ms:8.2f} ms  CPU ms {cpu}"


def quantiles_ms(took_s: Iterable[float]) -> tuple[float, float]:
    """Return the median and the 99th percentile in milliseconds."""
    ordered = sorted(took_s)
    return round(statistics.median(ordered) * 1e3, 3), round(ordered[int(len(ordered) * 0.99)] * 1e3, 3)


def middle(rows: Iterable[Row]) -> Row:
    """Return the row with the median rate of several measurements of one thing."""
    ordered = sorted(rows, key=lambda row: row.per_s)
    return ordered[len(ordered) // 2]


def milliseconds(value: float) -> str:
    """Return a duration with two digits or more, for a table."""
    return f"{value:,.0f} ms" if value >= 10 else f"{value:.2g} ms"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = ["".join(f"| {cell} " if cell else "| " for cell in cells) + "|" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
