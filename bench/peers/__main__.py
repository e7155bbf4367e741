"""Measure the whole mesh beside mosec, FastAPI and a bare loop, on the same nets and pictures, by turns.

    python -m bench.peers [--full] [--json FILE]

Each answers HTTP requests with a picture in the body; the bare loop receives nothing. All share this machine with the
load generator. Every answer is checked. Compare the ratios of one run, never figures of different machines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from atserving.errors import StartError
from atserving.local import examples
from atserving.local.child import ChildProcess
from atserving.local.examples import ROOT, Example
from atserving.local.foreground import run_until_stopped
from atserving.local.mesh import Mesh
from atserving.local.ports import free_ports
from bench import callers as load
from bench import machine
from bench.bare_loop import BareLoop, Setting
from bench.measurement import markdown_table, milliseconds
from bench.peers.picture_net import PictureNet, PictureNetFile
from bench.workload import WORKLOADS, Workload

OURS, MOSEC, FASTAPI, BARE_LOOP = "ours", "mosec", "fastapi", "bare_loop"
GENERATOR = "load generator"
_NETS = {"tiny": "digits", "mobilenet": "mobilenet"}
# The fastest of those that docs/benchmarks.md lists, on two cores with 32 callers.
_MOSEC = {
    "tiny": {"num": 2, "max_batch_size": 16, "max_wait_time": 1},
    "mobilenet": {"num": 2, "max_batch_size": 4, "max_wait_time": 1},
}
_START_S = 60.0
_SCORE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Plan:
    """What a run measures: for each net and number of callers the servers, and how long and often."""

    cases: tuple[tuple[str, int, tuple[str, ...]], ...]
    seconds: float
    rounds: int
    budget_s: float
    """A round that would end later, counted from the start of the run, is left out, but for the first."""

    @property
    def nets(self) -> list[str]:
        return list(dict.fromkeys(net for net, _, _ in self.cases))


SHORT = Plan(
    (
        ("tiny", 1, (OURS, FASTAPI)),
        ("tiny", 32, (OURS, MOSEC, FASTAPI)),
        ("mobilenet", 32, (OURS, MOSEC, BARE_LOOP)),
    ),
    seconds=1.0,
    rounds=3,
    budget_s=42,
)
FULL = Plan(
    tuple((net, callers, (OURS, MOSEC, FASTAPI, BARE_LOOP)) for net in _NETS for callers in (1, 8, 32, 64)),
    seconds=3.0,
    rounds=5,
    budget_s=3600,
)


@dataclass(frozen=True)
class Row:
    """One measurement. CPU is in microseconds per request, by process."""

    net: str
    callers: int
    server: str
    per_s: float
    p50_ms: float
    p99_ms: float
    errors: int
    cpu_us: dict[str, float]
    others: float
    """How many cores processes outside of the benchmark used meanwhile."""

    @property
    def server_cpu_us(self) -> float:
        """The CPU of everything but the load generator."""
        return sum(used for name, used in self.cpu_us.items() if name != GENERATOR)

    def __str__(self) -> str:
        cpu = ", ".join(f"{name} {used:,.0f}" for name, used in sorted(self.cpu_us.items(), key=lambda each: -each[1]))
        return (
            f"{self.net:10}{self.callers:4} {self.server:10}{self.per_s:9,.0f}/s  p50 {self.p50_ms:8.2f}  "
            f"p99 {self.p99_ms:8.2f} ms  errors {self.errors}  others {self.others:.2f}  CPU us {cpu}"
        )


@dataclass(frozen=True)
class Case:
    """A net, with what is known of it."""

    name: str
    workload: Workload
    file: PictureNetFile
    index: int
    score: float

    @property
    def expected(self) -> bytes:
        """A part of each right answer."""
        return b'"index":%d' % self.index


def prepare(name: str, folder: Path) -> tuple[Case, BareLoop]:
    """Convert a net, and run it once to know the right answer."""
    workload = WORKLOADS[_NETS[name]](folder)
    loop = BareLoop(workload, folder)
    answer = orjson.loads(PictureNet(loop.file).answers([workload.image])[0])
    return Case(name, workload, loop.file, answer["index"], answer["score"]), loop


class Server:
    """A server under test: where it listens, and its processes by name."""

    def __init__(
        self, url: str, processes: Callable[[], Mapping[str, Sequence[int]]], answer_of: Callable[[Any], Any]
    ) -> None:
        self.url = url
        self._processes = processes
        self._answer_of = answer_of

    def check(self, case: Case) -> None:
        """Wait until it answers, and check the answer. Raises StartError."""
        until_s = time.monotonic() + _START_S
        request = urllib.request.Request(
            self.url, case.workload.image, {"content-type": "application/octet-stream"}, method="POST"
        )
        while True:
            try:
                with urllib.request.urlopen(request, timeout=_START_S) as response:
                    answer = self._answer_of(orjson.loads(response.read()))
                break
            except urllib.error.HTTPError as error:
                raise StartError(f"{self.url} answers {error.code}: {error.read()[:200]!r}") from None
            except OSError as error:
                if time.monotonic() > until_s:
                    raise StartError(f"{self.url} does not answer: {error}") from None
                time.sleep(0.05)
        if answer["index"] != case.index or abs(answer["score"] - case.score) > _SCORE_TOLERANCE:
            raise StartError(f"{self.url} answers {answer}, not class {case.index} with {case.score}")

    def measure(self, case: Case, name: str, callers: int, seconds: float) -> Row:
        """Measure one row, after a short warm-up."""
        job = load.Job(self.url, case.workload.image, callers, seconds, expected=case.expected)
        with load.Running(job) as running:
            groups = {**self._processes(), GENERATOR: [running.pid]}
            running.begun()
            began, before = machine.Moment.now(), machine.usage(groups)
            seen = running.ended()
            others, after = machine.Moment.now().others_since(began), machine.usage(groups)
        used = {each: after[each].since(before[each]).cpu_s for each in groups}
        cpu_us = {each: round(used_s / seen.requests * 1e6, 1) for each, used_s in used.items() if used_s > 0}
        return Row(case.name, callers, name, seen.per_s, seen.p50_ms, seen.p99_ms, seen.errors, cpu_us, others)


def _measure_bare(loop: BareLoop, setting: Setting, case: Case, callers: int, seconds: float) -> Row:
    began = machine.Moment.now()
    row = loop.measure(setting, seconds, decodes=True)
    others = machine.Moment.now().others_since(began)
    cpu_us = {name: used * 1e3 for name, used in row.cpu_ms.items()}
    return Row(case.name, callers, BARE_LOOP, row.per_s, row.p50_ms, row.p99_ms, 0, cpu_us, others)


@asynccontextmanager
async def _peer(command: Sequence[str], log: Path, environment: Mapping[str, str], port: int) -> AsyncIterator[Server]:
    process = ChildProcess(command, log, cwd=ROOT, environment=environment)
    process.start()
    try:
        name = log.stem.partition("-")[0]
        yield Server(f"http://127.0.0.1:{port}/inference", lambda: {name: machine.tree(process.pid)}, lambda said: said)
    finally:
        process.kill_session()
        await process.ended()


def _our_answer(said: Any) -> Any:
    return said["result"]["confidences"][0]


@dataclass
class Bench:
    """Everything that runs, and the rows so far."""

    plan: Plan
    cases: dict[str, Case]
    loops: dict[str, tuple[BareLoop, Setting]]
    servers: dict[tuple[str, str], Server]
    rows: list[list[Row]] = field(default_factory=list)
    """By round."""
    repeated: int = 0

    def measure(self, net: str, callers: int, server: str) -> Row:
        """Measure one row; a second time if other processes disturbed the first."""
        row = self._measure(net, callers, server)
        if row.others > machine.BUSY_CORES:
            self.repeated += 1
            again = self._measure(net, callers, server)
            row = min(row, again, key=lambda each: each.others)
        print(row, flush=True)
        return row

    def _measure(self, net: str, callers: int, server: str) -> Row:
        case, seconds = self.cases[net], self.plan.seconds
        if server == BARE_LOOP:
            return _measure_bare(*self.loops[net], case, callers, seconds)
        return self.servers[net, server].measure(case, server, callers, seconds)

    def round(self, backwards: bool) -> None:
        """Measure every row once."""
        rows: list[Row] = []
        self.rows.append(rows)
        for net, callers, servers in self.plan.cases:
            for server in servers[:: -1 if backwards else 1]:
                rows.append(self.measure(net, callers, server))

    def figures(self) -> dict[str, Any]:
        """Return the ratios, the CPU time of each server, and all rows."""
        ratios: dict[str, dict[str, dict[str, float]]] = {}
        spread: dict[str, list[float]] = {}
        for net, callers, name, values in _ratios(self.rows):
            ratios.setdefault(net, {}).setdefault(f"c{callers}", {})[name] = round(statistics.median(values), 3)
            spread[f"{net}.c{callers}.{name}"] = [round(min(values), 3), round(max(values), 3)]
        rows = [row for each in self.rows for row in each]
        cpu_us: dict[str, dict[str, Any]] = {}
        for net, callers, servers in self.plan.cases:
            for server in servers:
                own = [row for row in rows if (row.net, row.callers, row.server) == (net, callers, server)]
                middle = sorted(own, key=lambda row: row.server_cpu_us)[len(own) // 2]
                cpu_us.setdefault(net, {}).setdefault(f"c{callers}", {})[server] = {
                    "sum": round(middle.server_cpu_us, 1),
                    **middle.cpu_us,
                }
        return {
            **ratios,
            "cpu_us": cpu_us,
            "spread": spread,
            "errors": sum(row.errors for row in rows),
            "disturbed": [asdict(row) for row in rows if row.others > machine.BUSY_CORES],
            "repeated": self.repeated,
            "rows": [asdict(row) for row in rows],
        }


def _ratios(rounds: Sequence[Sequence[Row]]) -> list[tuple[str, int, str, list[float]]]:
    """Return the ratios of ours to each peer, by net, callers and name; one value a round."""
    found: dict[tuple[str, int, str], list[float]] = {}
    for rows in rounds:
        ours = {(row.net, row.callers): row for row in rows if row.server == OURS}
        for row in rows:
            mine = ours[row.net, row.callers]
            if row.server == OURS:
                continue
            if row.callers == 1 and row.server != BARE_LOOP:
                found.setdefault((row.net, 1, f"p50_to_{row.server}"), []).append(mine.p50_ms / row.p50_ms)
            else:
                found.setdefault((row.net, row.callers, f"rate_to_{row.server}"), []).append(mine.per_s / row.per_s)
    return [(*key, values) for key, values in found.items()]


def table(figures: Mapping[str, Any]) -> str:
    """Return the figures as the table of README."""
    header = ("net, callers", "server", "requests/s", "p50", "CPU per request", "ours to it")
    lines = []
    rows = [Row(**row) for row in figures["rows"]]
    for net, callers, server in dict.fromkeys((row.net, row.callers, row.server) for row in rows):
        own = [row for row in rows if (row.net, row.callers, row.server) == (net, callers, server)]
        kind = "p50" if callers == 1 and server != BARE_LOOP else "rate"
        ratio = "" if server == OURS else f"{kind} {figures[net][f'c{callers}'][f'{kind}_to_{server}']:.2f}"
        lines.append(
            (
                f"{net}, {callers}" if server == OURS else "",
                server.replace("_", " "),
                f"{statistics.median(row.per_s for row in own):,.0f}",
                milliseconds(statistics.median(row.p50_ms for row in own)),
                milliseconds(figures["cpu_us"][net][f"c{callers}"][server]["sum"] / 1e3),
                ratio,
            )
        )
    return markdown_table(header, lines)


async def run(plan: Plan, began_s: float, result: dict[str, Any]) -> None:
    """Start every server, measure in rounds, and fill ``result`` with the figures. Raises StartError."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="atserving-bench-")))
        prepared = {name: await asyncio.to_thread(prepare, name, folder) for name in plan.nets}
        bench = Bench(plan, {name: case for name, (case, _) in prepared.items()}, {}, {})
        for name, case in bench.cases.items():
            for server in {each for net, _, servers in plan.cases if net == name for each in servers}:
                if server in _COMMANDS:
                    peer = _start_peer(server, case, folder)
                    bench.servers[name, server] = await stack.enter_async_context(peer)
        serves = [_example(case) for case in bench.cases.values()]
        mesh = await stack.enter_async_context(Mesh(serves=serves))
        for name, example in zip(bench.cases, serves, strict=True):
            url = f"{mesh.url}/v1/eval/{example.app}"
            bench.servers[name, OURS] = Server(url, lambda: machine.mesh_processes(mesh), _our_answer)
        for (name, _), each in bench.servers.items():
            await asyncio.to_thread(each.check, bench.cases[name])
        for name, (_, loop) in prepared.items():
            if any(BARE_LOOP in servers for net, _, servers in plan.cases if net == name):
                bench.loops[name] = loop, (await asyncio.to_thread(loop.best, plan.seconds / 8, decodes=True))[0]
        for number in range(plan.rounds):
            round_began_s = time.monotonic()
            await asyncio.to_thread(bench.round, backwards=bool(number % 2))
            now_s = time.monotonic()
            if now_s + (now_s - round_began_s) - began_s > plan.budget_s:
                break
        result.update(bench.figures())


_COMMANDS: Mapping[str, Sequence[str]] = {
    MOSEC: ("-m", "bench.peers.mosec_server", "--address", "127.0.0.1", "--port"),
    FASTAPI: ("-m", "uvicorn", "bench.peers.fastapi_server:app", "--no-access-log", "--log-level=warning", "--port"),
}


def _start_peer(server: str, case: Case, folder: Path) -> Any:
    (port,) = free_ports(1)
    environment = {**case.file.environment(), "BENCH_MOSEC": json.dumps(_MOSEC[case.name])}
    command = [sys.executable, *_COMMANDS[server], str(port)]
    return _peer(command, folder / f"{server}-{case.name}.log", environment, port)


def _example(case: Case) -> Example:
    # A path from the root stays itself below the examples' folder. Any picture will do to see that it answers.
    workload = case.workload
    images = examples.DIGITS[0].images
    return Example(workload.name, "v1", str(workload.tar), images, workload.title, workload.custom_values)


def main() -> None:
    began_s = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true", help="more callers, more servers, longer and more often")
    parser.add_argument("--net", choices=list(_NETS), action="append", help="only this net (default: all)")
    parser.add_argument("--seconds", type=float, help="how long each row takes (default: 1, with --full 3)")
    parser.add_argument("--rounds", type=int, help="how often each is measured (default: 3, with --full 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args()
    plan = FULL if arguments.full else SHORT
    plan = replace(
        plan,
        cases=tuple(case for case in plan.cases if not arguments.net or case[0] in arguments.net),
        seconds=arguments.seconds or plan.seconds,
        rounds=arguments.rounds or plan.rounds,
    )
    figures: dict[str, Any] = {}
    try:
        run_until_stopped(run(plan, began_s, figures))
    except (StartError, OSError) as error:
        raise SystemExit(str(error)) from None
    if not figures:
        raise SystemExit(1)
    for name, (least, most) in figures["spread"].items():
        net, callers, ratio = name.split(".")
        print(f"{name:40}{figures[net][callers][ratio]:8.3f}  ({least:.3f} to {most:.3f})")
    print(f"\n{table(figures)}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if figures["disturbed"]:
        print(f"\n{len(figures['disturbed'])} rows were disturbed: other processes used more than a tenth of a core.")
    if figures["errors"]:
        raise SystemExit(f"{figures['errors']} answers were refused or wrong")


if __name__ == "__main__":
    main()
