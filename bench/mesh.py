"""Measure the whole mesh under load: latency, requests per second, and what each process uses.

    python -m bench.mesh [--full] [--json FILE]

Everything runs on this machine, the load generator too. Its share of the CPU is shown, so that you can see whether it
is the bottleneck. Compare the ratios of one run, never figures of different machines.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from atserving.errors import StartError
from atserving.local import examples
from atserving.local.examples import Example
from atserving.local.foreground import run_until_stopped
from atserving.local.mesh import Mesh
from atserving.v1 import serving_pb2
from bench import callers as load
from bench import machine
from bench.measurement import markdown_table, milliseconds
from bench.workload import WORKLOADS

_PICTURE = "digits/images/7.png"
_RIGHT = b'"index":7'
_MAIN = "digits"
_GENERATOR = "load generator"
_SEVEN = (examples.FOLDER / _PICTURE).read_bytes()


@dataclass(frozen=True)
class Row:
    """One measurement. CPU is in milliseconds per request, memory in MB at the end, both by process."""

    name: str
    callers: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    errors: int
    cpu_ms: dict[str, float]
    switches: dict[str, float]
    """How often the threads of a process left the CPU, per request."""
    memory_mb: dict[str, float]
    others: float
    """How many cores processes outside of the benchmark used meanwhile."""

    def __str__(self) -> str:
        used = (
            f"{name} {cpu_ms:g} ({self.switches[name]:.1f})"
            for name, cpu_ms in sorted(self.cpu_ms.items(), key=lambda each: -each[1])
        )
        return (
            f"{self.name:28}{self.callers:8}{self.requests_per_s:9.0f}{self.p50_ms:9.2f}{self.p99_ms:9.2f}"
            f"{self.errors:8}{self.others:8.2f}  {', '.join(used)}"
        )


@dataclass(frozen=True)
class Case:
    """A kind of request, and by how many callers it is sent."""

    name: str
    callers: tuple[int, ...]
    job: Callable[[Mesh], load.Job]


def measure(mesh: Mesh, case: Case, callers: int, seconds: float) -> Row:
    """Measure one row, after a short warm-up; a second time if other processes disturbed the first."""
    row = _measure(mesh, case, callers, seconds)
    if row.others > machine.BUSY_CORES:
        row = min(row, _measure(mesh, case, callers, seconds), key=lambda each: each.others)
    return row


def _measure(mesh: Mesh, case: Case, callers: int, seconds: float) -> Row:
    with load.Running(replace(case.job(mesh), callers=callers, seconds=seconds)) as running:
        groups = {**machine.mesh_processes(mesh), _GENERATOR: [running.pid]}
        running.begun()
        began, before = machine.Moment.now(), machine.usage(groups)
        seen = running.ended()
        others, after = machine.Moment.now().others_since(began), machine.usage(groups)
    used = {name: after[name].since(before[name]) for name in groups}
    used = {name: each for name, each in used.items() if each.cpu_s > 0}
    return Row(
        case.name,
        callers,
        seen.per_s,
        seen.p50_ms,
        seen.p99_ms,
        seen.errors,
        {name: round(each.cpu_s / seen.requests * 1e3, 4) for name, each in used.items()},
        {name: round(each.switches / seen.requests, 2) for name, each in used.items()},
        {name: round(machine.memory_mb(pids), 1) for name, pids in groups.items() if name != _GENERATOR},
        others,
    )


def padded(picture: bytes, size: int) -> bytes:
    """Return a PNG of about ``size`` bytes with the same pixels: a chunk that decoders skip fills it."""
    chunk = b"teSt" + bytes(size)
    return picture[:33] + struct.pack(">I", size) + chunk + struct.pack(">I", zlib.crc32(chunk)) + picture[33:]


def cases(mobilenet: Example | None, picture: bytes, full: bool) -> Iterator[Case]:
    """Yield what is measured, on a mesh that serves the digits and perhaps MobileNet."""
    every = (1, 8, 32, 64, 256) if full else (1, 8, 32, 256)
    few = every if full else (32,)
    eval_path = "/v1/eval/digits/v1"
    yield Case("edge alone", (1, 32), lambda mesh: load.Job(f"{mesh.url}/health", b"", 1, 1))
    yield Case(_MAIN, every, _post(eval_path, _SEVEN))
    yield Case("digits, refused by the gate", (32,), _post("/v1/eval/nothing", _SEVEN, expected=b""))
    inline = {"uri": "data:image/png;base64," + base64.b64encode(_SEVEN).decode()}
    yield Case("digits, data URI", few, _json(eval_path, lambda mesh: {"data": inline}))
    yield Case(
        "digits, http URI", few, _json(eval_path, lambda mesh: {"data": {"uri": f"{mesh.files_url}/{_PICTURE}"}})
    )
    yield Case("digits, gRPC", few, _grpc)
    for size in (4_000, 100_000, 1_000_000, 9_000_000):
        yield Case(f"digits, {size // 1000:,} kB", every if full else (8,), _post(eval_path, padded(_SEVEN, size)))
    for tasks in (10, 100, 1000):
        batch = [{"op": eval_path, "data": inline}] * tasks
        yield Case(f"digits, batch of {tasks}", (1, 8) if full else (1,), _json("/v1/batch", partial(_constant, batch)))
    if mobilenet:
        yield Case("mobilenet", every if full else (1, 32), _post("/v1/eval/mobilenet/v1", picture, b'"index":'))


def _constant(value: object, _: Mesh) -> object:
    return value


def _post(path: str, body: bytes, expected: bytes = _RIGHT) -> Callable[[Mesh], load.Job]:
    return lambda mesh: load.Job(mesh.url + path, body, 1, 1, expected=expected)


def _json(path: str, value: Callable[[Mesh], object]) -> Callable[[Mesh], load.Job]:
    return lambda mesh: load.Job(
        mesh.url + path, json.dumps(value(mesh)).encode(), 1, 1, content_type="application/json", expected=_RIGHT
    )


def _grpc(mesh: Mesh) -> load.Job:
    request = serving_pb2.EvalRequest(app="digits", version="v1", data=[serving_pb2.Resource(body=_SEVEN)])
    method = "/atserving.v1.ServingService/Eval"
    return load.Job(mesh.url, request.SerializeToString(), 1, 1, method=method, expected=_RIGHT)


async def run(seconds: float, full: bool, rows: list[Row]) -> None:
    """Add every measurement to ``rows``, all on one mesh, and print it."""
    with tempfile.TemporaryDirectory(prefix="atserving-bench-") as folder:
        made = WORKLOADS["mobilenet"](Path(folder))
        mobilenet = Example(made.name, "v1", str(made.tar), (_PICTURE,), made.title, made.custom_values)
        async with Mesh(serves=[examples.DIGITS[0], mobilenet]) as mesh:
            print(
                f"{'request':28}{'callers':>8}{'req/s':>9}{'p50 ms':>9}{'p99 ms':>9}{'errors':>8}{'others':>8}"
                "  CPU ms per request (and switches)"
            )
            for case in cases(mobilenet, made.image, full):
                for callers in case.callers:
                    row = await asyncio.to_thread(measure, mesh, case, callers, seconds)
                    print(row, flush=True)
                    rows.append(row)


def table(rows: Iterable[Row]) -> str:
    """Return the rows of the digits as the table of README."""
    header = ("callers", "requests/s", "p50", "p99", "CPU per request")
    lines = [
        (
            *(str(row.callers), f"{row.requests_per_s:,.0f}"),
            *(milliseconds(value) for value in (row.p50_ms, row.p99_ms, sum(row.cpu_ms.values()))),
        )
        for row in rows
        if row.name == _MAIN
    ]
    return markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true", help="every kind of request with 1 to 256 callers, for longer")
    parser.add_argument("--seconds", type=float, help="how long each row takes (default: 1.5, with --full 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args()
    rows: list[Row] = []
    try:
        run_until_stopped(run(arguments.seconds or (5.0 if arguments.full else 1.5), arguments.full, rows))
    except (StartError, OSError) as error:
        raise SystemExit(str(error)) from None
    if rows:
        print(f"\nMemory at the end, MB: {', '.join(f'{name} {mb:g}' for name, mb in rows[-1].memory_mb.items())}")
    disturbed = sum(row.others > machine.BUSY_CORES for row in rows)
    if disturbed:
        print(f"{disturbed} rows were disturbed: other processes used more than a tenth of a core.")
    print(f"\n{table(rows)}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
