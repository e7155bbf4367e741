"""The figures of a comparison: ratios within each round, and a table for README."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench import machine
from bench.measurement import markdown_table, milliseconds
from bench.peers.rounds import BARE_LOOP, OURS, Bench, Row

Key = tuple[str, int, str]
"""A net, a number of callers and a server."""


def figures(bench: Bench) -> dict[str, Any]:
    """Return the ratios, the CPU time of a request by process, and every row."""
    rows = [row for each in bench.rounds for row in each]
    found: dict[str, Any] = {net: {} for net in bench.plan.nets}
    spread: dict[str, list[float]] = {}
    for (net, callers, server), values in _ratios(bench.rounds).items():
        name = f"{_kind(callers)}_to_{server}"
        found[net].setdefault(f"c{callers}", {})[name] = round(statistics.median(values), 3)
        spread[f"{net}.c{callers}.{name}"] = [round(min(values), 3), round(max(values), 3)]
    cpu_us: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for (net, callers, server), own in _by_key(rows).items():
        middle = sorted(own, key=lambda row: row.server_cpu_us)[len(own) // 2]
        used = {"sum": round(middle.server_cpu_us, 1), **middle.cpu_us}
        cpu_us.setdefault(net, {}).setdefault(f"c{callers}", {})[server] = used
    return {
        **found,
        "cpu_us": cpu_us,
        "spread": spread,
        "refused": sum(row.refused for row in rows),
        "wrong": sum(row.wrong for row in rows),
        "repeated": bench.repeated,
        "disturbed": [asdict(row) for row in rows if row.others > machine.BUSY_CORES],
        "rows": [asdict(row) for row in rows],
    }


def _kind(callers: int) -> str:
    """Return the figure that is compared: one caller waits, many share the cores."""
    return "p50" if callers == 1 else "rate"


def _ratios(rounds: Sequence[Sequence[Row]]) -> dict[Key, list[float]]:
    """Return ours by theirs for each peer, one value a round."""
    found: dict[Key, list[float]] = {}
    for rows in rounds:
        ours = {(row.net, row.callers): row for row in rows if row.server == OURS}
        for row in rows:
            mine = ours.get((row.net, row.callers))
            if mine is None or row is mine:
                continue
            pair = (mine.p50_ms, row.p50_ms) if _kind(row.callers) == "p50" else (mine.per_s, row.per_s)
            # Without right answers there is nothing to compare, and the run has failed.
            if all(pair):
                found.setdefault((row.net, row.callers, row.server), []).append(pair[0] / pair[1])
    return found


def _by_key(rows: Sequence[Row]) -> dict[Key, list[Row]]:
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault((row.net, row.callers, row.server), []).append(row)
    return found


def table(figures: Mapping[str, Any]) -> str:
    """Return the figures as the table of README."""
    header = ("net", "callers", "server", "requests/s", "p50", "CPU per request", "ours to it")
    lines = []
    last: tuple[str, int] | None = None
    for (net, callers, server), rows in _by_key([Row(**row) for row in figures["rows"]]).items():
        name = f"{_kind(callers)}_to_{server}"
        ratio = ""
        if name in figures[net].get(f"c{callers}", {}):
            least, most = figures["spread"][f"{net}.c{callers}.{name}"]
            ratio = f"{_kind(callers)} {figures[net][f'c{callers}'][name]:.2f} ({least:.2f} to {most:.2f})"
        p50_ms = statistics.median(row.p50_ms for row in rows)
        lines.append(
            (
                *((net, str(callers)) if last != (net, callers) else ("", "")),
                server.replace("_", " "),
                f"{statistics.median(row.per_s for row in rows):,.0f}",
                # The bare loop's times are of whole batches.
                "" if server == BARE_LOOP else milliseconds(p50_ms),
                milliseconds(figures["cpu_us"][net][f"c{callers}"][server]["sum"] / 1e3),
                ratio,
            )
        )
        last = (net, callers)
    return markdown_table(header, lines)
