"""Measure one evaluator beside its parts: onnxruntime alone, a bare loop around it, and the service over real gRPC.

    python -m bench.evaluator [--net NET ...] [--seconds 2] [--rounds 3] [--json FILE]

The nets are the small one of the example digits, and MobileNet v1 with random weights. The bare loop decodes, resizes
and runs the net in the best of several settings: loops, threads of onnxruntime, images in a batch. The evaluator is a
real one, with a registry and etcd. A load generator on the same cores calls it over one link, like a gate. Loop and
evaluator are measured by turns; compare the ratios of one run, never figures of different machines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import cv2
import uvloop

from atserving.errors import StartError
from bench import load
from bench.bare_loop import BareLoop, Setting
from bench.measurement import Row, markdown_table, middle, milliseconds
from bench.processes import Registry, running_evaluator, running_registry
from bench.workload import WORKLOADS, Workload

CALLERS = (1, 8, 32, 64)
Figures = dict[str, float]


def compare(
    registry: Registry, workload: Workload, folder: Path, seconds: float, rounds: int
) -> tuple[list[Row], Figures]:
    """Measure one workload; return every row and the figures."""
    loop = BareLoop(workload, folder)
    alone, rows = loop.best(seconds / 4, decodes=False)
    bare, tried = loop.best(seconds / 4, decodes=True)
    rows += tried
    registry.publish(workload.name, workload.tar, workload.custom_values)
    by_round: list[dict[str, Row]] = []
    with running_evaluator(registry, workload.name, folder / f"{workload.name}.log") as evaluator:
        one = Setting(1, evaluator.threads, 1)
        for callers in CALLERS:
            load.measure(evaluator, workload, callers, seconds / 4)
        for _ in range(rounds):
            by_round.append(
                {
                    "alone": loop.measure(alone, seconds, decodes=False),
                    "bare": loop.measure(bare, seconds, decodes=True),
                    "bare one": loop.measure(one, seconds, decodes=True),
                }
                | {f"c{callers}": load.measure(evaluator, workload, callers, seconds) for callers in CALLERS}
            )
    rows += [middle(each[what] for each in by_round) for what in by_round[0]]
    return rows, {f"{workload.name}.{name}": round(value, 6) for name, value in _figures(by_round).items()}


def _figures(by_round: list[dict[str, Row]]) -> Figures:
    """Return medians over the rounds; a ratio is the median of the ratios within each round."""

    def median(what: str, value: Callable[[Row], float]) -> float:
        return statistics.median(value(rows[what]) for rows in by_round)

    figures = {
        "bare_loop.per_s": median("bare", lambda row: row.per_s),
        "onnxruntime.per_s": median("alone", lambda row: row.per_s),
    }
    for what in (f"c{callers}" for callers in CALLERS):
        ratios = (rows[what].per_s / rows["bare"].per_s for rows in by_round)
        figures |= {
            f"{what}.per_s": median(what, lambda row: row.per_s),
            f"{what}.p50_ms": median(what, lambda row: row.p50_ms),
            f"{what}.p99_ms": median(what, lambda row: row.p99_ms),
            f"{what}.cpu_s": median(what, lambda row: sum(row.cpu_ms.values()) / 1e3),
            f"{what}.errors": sum(rows[what].errors for rows in by_round),
            f"{what}.ratio_to_bare_loop": statistics.median(ratios),
        }
    added_ms = (rows["c1"].p50_ms - rows["bare one"].p50_ms for rows in by_round)
    figures["c1.added_p50_ms"] = statistics.median(added_ms)
    return figures


def table(workloads: Iterable[Workload], figures: Mapping[str, float]) -> str:
    """Return the figures as the table of README."""
    header = ("net, image", "callers", "requests/s", "p50", "p99", "CPU per request", "against the bare loop")
    lines = []
    for workload in workloads:
        for callers in CALLERS:
            prefix = f"{workload.name}.c{callers}"
            ratio = f"{figures[f'{prefix}.ratio_to_bare_loop']:.2f} of its rate"
            if callers == 1:
                ratio = f"{figures[f'{prefix}.added_p50_ms']:.2f} ms more at the median"
            times = [milliseconds(figures[f"{prefix}.{name}"]) for name in ("p50_ms", "p99_ms")]
            cpu = milliseconds(figures[f"{prefix}.cpu_s"] * 1e3)
            title = workload.title if callers == CALLERS[0] else ""
            lines.append((title, str(callers), f"{figures[f'{prefix}.per_s']:,.0f}", *times, cpu, ratio))
    return markdown_table(header, lines)


def measure(names: Iterable[str], folder: Path, seconds: float, rounds: int) -> tuple[list[Row], Figures]:
    """Measure the workloads one by one, and print the results."""
    rows: list[Row] = []
    figures: Figures = {}
    workloads = []
    with running_registry(folder / "registry") as registry:
        for name in names:
            workload = WORKLOADS[name](folder)
            print(f"{name}:", flush=True)
            its_rows, its_figures = compare(registry, workload, folder, seconds, rounds)
            for row in its_rows:
                print(f"  {row}", flush=True)
            rows, figures = rows + its_rows, figures | its_figures
            workloads.append(workload)
    for name, value in figures.items():
        print(f"{name:40}{value:12.4g}")
    print(f"\n{table(workloads, figures)}")
    return rows, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--net", action="append", choices=list(WORKLOADS), help="only this net (default: all)")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each row takes (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args()
    # The loops are the parallelism, as an evaluator's engines are.
    cv2.setNumThreads(1)
    uvloop.install()
    try:
        with tempfile.TemporaryDirectory(prefix="atserving-bench-") as folder:
            rows, figures = measure(arguments.net or WORKLOADS, Path(folder), arguments.seconds, arguments.rounds)
    except (StartError, TimeoutError) as error:
        raise SystemExit(str(error)) from None
    if arguments.json:
        arguments.json.write_text(json.dumps({**figures, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
