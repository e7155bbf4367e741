"""Measure the whole mesh under load: latency for one caller, requests per second for many, and CPU time by process.

    python -m bench.mesh [--seconds 10] [--json FILE]

Everything runs on this machine, the load generator (wrk, with one thread) too. Its share of the CPU is shown, so that
you can see whether it is the bottleneck. Compare the ratios of one run, never figures of different machines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from atserving.errors import StartError
from atserving.local import examples, proc
from atserving.local.foreground import run_until_stopped
from atserving.local.mesh import Mesh
from bench.measurement import markdown_table, milliseconds

_DIGITS = "digits"
_UNITS_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True)
class Row:
    """One measurement. CPU is in milliseconds per request, by process."""

    name: str
    callers: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    errors: int
    cpu_ms: dict[str, float]


def cpu_seconds(mesh: Mesh) -> dict[str, float]:
    """Return the CPU seconds so far of each process of the mesh.

    The worker process of an evaluator is a child of its front process, and counted apart from it.
    """
    seconds: dict[str, float] = {}
    for name, pid in mesh.pids().items():
        seconds[name] = proc.cpu_s(pid)
        if children := proc.descendants(pid):
            seconds[f"{name} worker"] = sum(each.cpu_s for each in children)
    return seconds


def wrk(url: str, script: Path, callers: int, seconds: float) -> tuple[float, float, float, int, int, float]:
    """Return requests per second, p50 and p99 in ms, requests, errors, and wrk's own CPU seconds."""
    before = os.times()
    command = ["wrk", "-t1", f"-c{callers}", f"-d{seconds:g}s", "--latency", "--timeout", "30s", "-s", str(script), url]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    after = os.times()
    own_s = after.children_user + after.children_system - before.children_user - before.children_system

    def number(pattern: str) -> float:
        found = re.search(pattern, report)
        return float(found[1]) if found else 0.0

    def latency_ms(percent: int) -> float:
        found = re.search(rf"^\s+{percent}%\s+([\d.]+)(us|ms|s)$", report, re.MULTILINE)
        assert found, report
        return float(found[1]) * _UNITS_MS[found[2]]

    requests = int(number(r"(\d+) requests in"))
    errors = int(number(r"Non-2xx or 3xx responses: (\d+)"))
    return number(r"Requests/sec:\s+([\d.]+)"), latency_ms(50), latency_ms(99), requests, errors, own_s


def measure(mesh: Mesh, name: str, path: str, body: bytes | None, callers: int, seconds: float) -> Row:
    """Measure one row, after a short warm-up."""
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "request.lua"
        script.write_text(_script(body))
        wrk(mesh.url + path, script, callers, min(2.0, seconds))
        before = cpu_seconds(mesh)
        rate, p50_ms, p99_ms, requests, errors, own_s = wrk(mesh.url + path, script, callers, seconds)
        used = {each: now - before.get(each, 0) for each, now in cpu_seconds(mesh).items()} | {"load generator": own_s}
    cpu_ms = {each: round(used_s / requests * 1e3, 3) for each, used_s in used.items() if used_s / requests >= 1e-6}
    return Row(name, callers, rate, p50_ms, p99_ms, errors, cpu_ms)


def _script(body: bytes | None) -> str:
    if body is None:
        return 'wrk.method = "GET"'
    escaped = "".join(f"\\{byte:03d}" for byte in body)
    return f'wrk.method = "POST"\nwrk.headers["content-type"] = "application/octet-stream"\nwrk.body = "{escaped}"'


async def run(seconds: float, rows: list[Row]) -> None:
    """Add every measurement to ``rows``, all on one mesh."""
    image = (examples.FOLDER / "digits" / "images" / "7.png").read_bytes()
    async with Mesh() as mesh:
        for name, path, body, callers in (
            ("edge alone", "/health", None, 1),
            ("edge alone", "/health", None, 32),
            (_DIGITS, "/v1/eval/digits/v1", image, 1),
            (_DIGITS, "/v1/eval/digits/v1", image, 8),
            (_DIGITS, "/v1/eval/digits/v1", image, 32),
            ("digits, refused by the gate", "/v1/eval/nothing", image, 32),
        ):
            rows.append(await asyncio.to_thread(measure, mesh, name, path, body, callers, seconds))


def table(rows: list[Row]) -> str:
    """Return the rows of the digits as the table of README."""
    header = ("callers", "requests/s", "p50", "p99", "CPU per request")
    lines = [
        (
            *(str(row.callers), f"{row.requests_per_s:,.0f}"),
            *(milliseconds(value) for value in (row.p50_ms, row.p99_ms, sum(row.cpu_ms.values()))),
        )
        for row in rows
        if row.name == _DIGITS
    ]
    return markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each row takes (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args()
    if not shutil.which("wrk"):
        raise SystemExit("the benchmark needs wrk, a load generator: apt-get install wrk")
    rows: list[Row] = []
    try:
        run_until_stopped(run(arguments.seconds, rows))
    except StartError as error:
        raise SystemExit(str(error)) from None
    print(f"{'request':28}{'callers':>8}{'req/s':>9}{'p50 ms':>9}{'p99 ms':>9}{'errors':>8}  CPU ms per request")
    for row in rows:
        cpu = ", ".join(f"{name} {value:g}" for name, value in sorted(row.cpu_ms.items(), key=lambda each: -each[1]))
        print(
            f"{row.name:28}{row.callers:8}{row.requests_per_s:9.0f}{row.p50_ms:9.2f}{row.p99_ms:9.2f}"
            f"{row.errors:8}  {cpu}"
        )
    print(f"\n{table(rows)}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
