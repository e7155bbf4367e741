"""Measure the whole mesh under load: latency, requests per second, and what each process uses.

    python -m bench.mesh [--full] [--json FILE]

Everything runs on this machine, the load generator too. Its share of the CPU is shown, so that you can see whether it
is the bottleneck. Compare the ratios of one run, never figures of different machines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from atserving.errors import StartError
from atserving.local import commands
from atserving.local.foreground import run_until_stopped
from atserving.local.mesh import Mesh
from atserving.local.ports import free_ports
from bench import machine, under_load
from bench.callers import Job
from bench.measurement import markdown_table, milliseconds
from bench.picture_net import PictureNet
from bench.processes import running
from bench.requests import Target
from bench.under_load import busiest, undisturbed
from bench.workload import WORKLOADS, Workload

_MAIN = "digits"
_CALLERS = (1, 8, 32, 64, 256)
_BODY_BYTES = (4_000, 100_000, 1_000_000, 10_000_000)
_TASKS = (10, 100, 1000)
# A row is measured again only before this.
_SHORT_S = 80.0


@dataclass(frozen=True)
class Row:
    """One measurement. All by process: CPU in microseconds and switches per request, memory in MB at the end."""

    name: str
    callers: int
    per_s: float
    p50_ms: float
    p99_ms: float
    refused: int
    wrong: int
    cpu_us: dict[str, float]
    waits: dict[str, float]
    """How often its threads gave up the CPU: voluntary context switches."""
    preemptions: dict[str, float]
    """How often its threads had to leave the CPU: involuntary context switches."""
    memory_mb: dict[str, float]
    others: float
    """How many cores processes outside of the benchmark used meanwhile."""

    def __str__(self) -> str:
        used = (
            f"{name} {self.cpu_us[name]:,.0f} ({self.waits[name]:.1f}+{self.preemptions[name]:.1f})"
            for name in busiest(self.cpu_us)
        )
        return (
            f"{self.name:24}{self.callers:8}{self.per_s:9,.0f}{self.p50_ms:9.2f}{self.p99_ms:9.2f}"
            f"{self.refused:8}{self.wrong:8}{self.others:8.2f}  {', '.join(used)}"
        )


@dataclass(frozen=True)
class Case:
    """A kind of request, and by how many callers it is sent."""

    name: str
    callers: Sequence[int]
    job: Job


def _measure(mesh: Mesh, files: int, case: Case, callers: int, seconds: float) -> Row:
    processes = {**machine.mesh_processes(mesh), "files": [files]}
    seen = under_load.measure(replace(case.job, callers=callers, seconds=seconds), processes)
    load, cpu_us = seen.load, seen.cpu_us()
    return Row(
        case.name,
        callers,
        load.per_s,
        load.p50_ms,
        load.p99_ms,
        load.refused,
        load.wrong,
        cpu_us,
        {name: round(seen.used[name].waits / load.answers, 2) for name in cpu_us},
        {name: round(seen.used[name].preemptions / load.answers, 2) for name in cpu_us},
        {name: round(machine.memory_mb(pids), 1) for name, pids in processes.items()},
        seen.others,
    )


def cases(targets: Iterable[Target], full: bool) -> Iterator[Case]:
    """Yield what is measured: each kind of request to each app, and for the digits large bodies and batches."""
    for target in targets:
        every = full or target.app == _MAIN
        some = _CALLERS if full else (32,)
        yield Case(target.app, _CALLERS if every else (1, 32), target.octet_stream())
        if every:
            yield Case(f"{target.app}, data URI", some, target.data_uri())
            yield Case(f"{target.app}, http URI", some, target.http_uri())
            yield Case(f"{target.app}, gRPC", some, target.grpc())
        if target.app == _MAIN:
            yield Case("edge alone", (1, 32), target.health())
            yield Case("unknown app", (32,), target.unknown_app())
            for size in _BODY_BYTES:
                yield Case(f"{target.app}, {size // 1000:,} kB", (1, 8, 32) if full else (8,), target.padded(size))
            for count in _TASKS:
                yield Case(f"{target.app}, batch of {count}", (1, 8) if full else (1,), target.batch(count))


def _prepare(workload: Workload, folder: Path, edge: str, files: str) -> Target:
    """Run a net once to know the right answer, and put its picture where ``files`` serves it."""
    picture = folder / f"{workload.name}-picture"
    picture.write_bytes(workload.image)
    answer = PictureNet(workload.convert(folder)).answer(workload.image)
    return Target(edge, workload.name, workload.image, f"{files}/{picture.name}", answer)


async def run(seconds: float, full: bool, until_s: float, rows: list[Row]) -> None:
    """Add every measurement to ``rows``, all on one mesh, and print it. Raises StartError."""
    with tempfile.TemporaryDirectory(prefix="atserving-bench-") as name:
        folder = Path(name)
        workloads = [make(folder) for make in WORKLOADS.values()]
        (port,) = free_ports(1)
        with running(commands.file_server(folder, port), folder / "files.log") as files:
            examples = [workload.example for workload in workloads]
            allowed = {
                f"evaluator-{each.app}-{each.version}": ["--allow-network", f"127.0.0.1:{port}"] for each in examples
            }
            async with Mesh(serves=examples, extra=allowed) as mesh:
                targets = [
                    await asyncio.to_thread(_prepare, workload, folder, mesh.url, f"http://127.0.0.1:{port}")
                    for workload in workloads
                ]
                print(
                    f"{'request':24}{'callers':>8}{'req/s':>9}{'p50 ms':>9}{'p99 ms':>9}{'refused':>8}{'wrong':>8}"
                    f"{'others':>8}  CPU us per request (voluntary + involuntary switches)"
                )
                for case in cases(targets, full):
                    for callers in case.callers:
                        measure = partial(_measure, mesh, files.pid, case, callers, seconds)
                        row, _ = await asyncio.to_thread(undisturbed, measure, until_s)
                        print(row, flush=True)
                        rows.append(row)


def table(rows: Iterable[Row]) -> str:
    """Return the rows of the digits as the table of README."""
    header = ("callers", "requests/s", "p50", "p99", "CPU per request")
    lines = [
        (
            *(str(row.callers), f"{row.per_s:,.0f}"),
            *(milliseconds(value) for value in (row.p50_ms, row.p99_ms, sum(row.cpu_us.values()) / 1e3)),
        )
        for row in rows
        if row.name == _MAIN
    ]
    return markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true", help="every kind of request with 1 to 256 callers, for longer")
    parser.add_argument("--seconds", type=float, help="how long each row takes (default: 1, with --full 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args()
    rows: list[Row] = []
    seconds = arguments.seconds or (3.0 if arguments.full else 1.0)
    until_s = math.inf if arguments.full else time.monotonic() + _SHORT_S
    try:
        run_until_stopped(run(seconds, arguments.full, until_s, rows))
    except (StartError, OSError) as error:
        raise SystemExit(str(error)) from None
    if not rows:
        raise SystemExit(1)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    print(f"\nMemory at the end, MB: {', '.join(f'{name} {mb:g}' for name, mb in rows[-1].memory_mb.items())}")
    if disturbed := sum(row.others > machine.BUSY_CORES for row in rows):
        print(f"{disturbed} rows were disturbed: other processes used more than a tenth of a core.")
    print(f"\n{table(rows)}", flush=True)
    if wrong := sum(row.wrong for row in rows):
        raise SystemExit(f"{wrong} answers were wrong")


if __name__ == "__main__":
    main()
