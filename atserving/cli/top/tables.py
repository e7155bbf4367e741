"""Write a reading as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from atserving.cli.tables import printable
from atserving.cli.top.changes import Load, Reading

HEADERS = (
    *("APP", "VERSION", "READY", "REQ/S", "5XX/S", "4XX/S", "P50 ms", "P99 ms"),
    *("IN FLIGHT", "QUEUE", "BATCH", "RESTARTS"),
)

_NO_APP = "(no app)"


def header(reading: Reading) -> str:
    """Return what is said above the table."""
    found = ", ".join(
        f"{count} {_plural(kind) if count != 1 else kind}" for kind, count in reading.processes.items() if count
    )
    total = sum(each.requests_per_s for each in reading.loads if not each.version)
    return f"{total:,.0f} requests/s in the last {reading.seconds:.1f} s, by {found or 'no process'}"


def _plural(kind: str) -> str:
    return "registries" if kind == "registry" else f"{kind}s"


def rows(reading: Reading, app: str = "", *, instances: bool = False) -> list[tuple[Load, tuple[str, ...]]]:
    """Return a line of cells for each app and version, for those of one app, and with ``instances`` for these, too."""
    return [
        (each, _cells(each))
        for each in reading.loads
        if (not app or each.app == app) and (instances or not each.instance)
    ]


def _cells(load: Load) -> tuple[str, ...]:
    name = printable(load.app) or _NO_APP
    return (
        name if not load.version else "",
        f"  {printable(load.instance)}" if load.instance else printable(load.version),
        _ready(load),
        _rate(load.requests_per_s),
        _rate(load.errors_per_s),
        _rate(load.refused_per_s),
        _ms(load.p50_ms),
        _ms(load.p99_ms),
        "-" if load.in_flight is None else f"{load.in_flight}" + (f"/{load.capacity}" if load.capacity else ""),
        _whole(load.queue),
        "-" if load.batch is None else f"{load.batch:.1f}",
        _whole(load.restarts),
    )


def is_bad(load: Load) -> bool:
    """Whether somebody should look: errors, or a version whose registered instances no gate can reach."""
    return load.errors_per_s > 0 or (load.ready == 0 and bool(load.registered))


def _ready(load: Load) -> str:
    if load.ready is None and load.registered is None:
        return "" if not load.version or load.instance else "-"
    if load.registered is None:
        return str(load.ready)
    return f"{'-' if load.ready is None else load.ready}/{load.registered}"


def _rate(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 0.05 else "<0.1"


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _whole(value: int | None) -> str:
    return "-" if value is None else str(value)


def widths(lines: Sequence[Sequence[str]]) -> list[int]:
    """Return the width of each column."""
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def aligned(cells: Sequence[str], columns: Sequence[int]) -> str:
    """Return a line of the table: names to the left, numbers to the right."""
    named = 2
    parts = [
        cell.ljust(width) if number < named else cell.rjust(width)
        for number, (cell, width) in enumerate(zip(cells, columns, strict=True))
    ]
    return "  ".join(parts).rstrip()
