"""Tell where the CPU time of a request goes, by function, in the gate and in an evaluator's front and worker.

    python -m bench.profile [--net digits|mobilenet] [--callers 32] [--seconds 4]

py-spy samples each process in turn while callers load the mesh. It slows the process by some percent: take the shares,
not the sum. Envoy is no Python; only its CPU time is shown.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from atserving.errors import StartError
from atserving.local.examples import Example
from atserving.local.foreground import run_until_stopped
from atserving.local.mesh import Mesh
from bench import callers as load
from bench import machine
from bench.workload import WORKLOADS, Workload

_RATE_HZ = 997
_SHOWN = 15
# Threads that wait for work, which py-spy takes for busy.
_IDLE = (
    "Thread.run (",
    "_worker (concurrent/futures/",
    "wait (threading.py",
    "_run_safe_shutdown_loop (",
    "Worker._watch (",
)


def shares(stacks: Iterable[str]) -> tuple[Counter[str], Counter[str], int]:
    """Count the samples of py-spy's raw format: those in each function itself, those in or below it, and all."""
    own: Counter[str] = Counter()
    total: Counter[str] = Counter()
    samples = 0
    for line in stacks:
        stack, _, text = line.rpartition(" ")
        functions = [each.rpartition(":")[0] + ")" if ":" in each else each for each in stack.split(";")]
        if functions[-1].startswith(_IDLE):
            continue
        count = int(text)
        samples += count
        own[functions[-1]] += count
        for function in set(functions):
            total[function] += count
    return own, total, samples


def report(name: str, cpu_us: float, stacks: Iterable[str]) -> str:
    """Return the functions of a process that take most of its CPU time."""
    own, total, samples = shares(stacks)
    lines = [f"{name}: {cpu_us:.0f} us of CPU per request", "     own    total  function"]
    for function, count in own.most_common(_SHOWN):
        lines.append(f"{count / samples:8.1%} {total[function] / samples:8.1%}  {function}")
    return "\n".join(lines) + "\n"


def _profile(mesh: Mesh, workload: Workload, name: str, callers: int, seconds: float, folder: Path) -> str:
    groups = machine.mesh_processes(mesh)
    (pid, *_) = groups[name]
    job = load.Job(f"{mesh.url}/v1/eval/{workload.name}/v1", workload.image, callers, seconds + 1)
    out = folder / "stacks.txt"
    with load.Running(job) as running:
        running.begun()
        before = machine.usage(groups)
        spy = [str(Path(sys.executable).parent / "py-spy"), "record", "--format", "raw", "--rate", str(_RATE_HZ)]
        command = [*spy, "--duration", str(round(seconds)), "--output", str(out), "--pid", str(pid)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seen = running.ended()
        used = machine.usage(groups)[name].since(before[name])
    if done.returncode or not out.exists():
        raise StartError(f"py-spy can't look into process {pid}; it needs the right to trace it: {done.stderr.strip()}")
    return report(name, used.cpu_s / seen.requests * 1e6, out.read_text().splitlines())


async def run(net: str, callers: int, seconds: float) -> None:
    """Profile each process in turn, and print what was found. Raises StartError."""
    with tempfile.TemporaryDirectory(prefix="atserving-bench-") as name:
        folder = Path(name)
        workload = WORKLOADS[net](folder)
        picture = ("digits/images/7.png",)
        example = Example(workload.name, "v1", str(workload.tar), picture, workload.title, workload.custom_values)
        async with Mesh(serves=[example]) as mesh:
            front = f"evaluator-{workload.name}-v1"
            for process in ("gate", front, f"{front} worker"):
                found = await asyncio.to_thread(_profile, mesh, workload, process, callers, seconds, folder)
                print(found, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--net", choices=list(WORKLOADS), default="digits", help="the net (default: digits)")
    parser.add_argument("--callers", type=int, default=32, help="how many callers (default: 32)")
    parser.add_argument("--seconds", type=float, default=4.0, help="how long each process is sampled (default: 4)")
    arguments = parser.parse_args()
    try:
        run_until_stopped(run(arguments.net, arguments.callers, arguments.seconds))
    except (StartError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
