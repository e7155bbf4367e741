"""Tell where the CPU time of a request goes, by function, in the gate and in an evaluator's front and worker.

    python -m bench.profile [--net digits|mobilenet] [--callers 32] [--seconds 4]

First the CPU time of each process is measured. Then py-spy samples the Python processes in turn under the same load.
That slows them by some percent, so its shares are multiplied by the CPU time that was measured before. Envoy is no
Python: it has a sum only.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from atserving.errors import StartError
from atserving.local.foreground import run_until_stopped
from atserving.local.mesh import Mesh
from bench import machine, under_load
from bench.callers import Job, Running
from bench.workload import WORKLOADS

_RATE_HZ = 997
_SHOWN = 15
# Threads that wait for work, which py-spy takes for busy.
_IDLE = (
    "Thread.run (",
    "_worker (concurrent/futures/",
    "wait (threading.py",
    "_ChannelShutdownManager._run_safe_shutdown_loop (",
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


def table(name: str, cpu_us: float, stacks: Iterable[str]) -> str:
    """Return the functions of a process that take most of its CPU time: microseconds a request, and shares."""
    own, total, samples = shares(stacks)
    lines = [
        f"{name}: {cpu_us:.0f} us of CPU per request",
        f"{'own us':>8}{'own':>8}{'total us':>10}{'total':>8}  function",
    ]
    for function, count in own.most_common(_SHOWN):
        parts = count / samples, total[function] / samples
        lines.append(f"{parts[0] * cpu_us:8.1f}{parts[0]:8.1%}{parts[1] * cpu_us:10.1f}{parts[1]:8.1%}  {function}")
    return "\n".join(lines) + "\n"


def _sample(pid: int, job: Job, seconds: float, out: Path) -> list[str]:
    """Return the stacks of a process under load. Raises StartError."""
    with Running(job) as running:
        running.begun()
        spy = [str(Path(sys.executable).parent / "py-spy"), "record", "--format", "raw", "--rate", str(_RATE_HZ)]
        command = [*spy, "--duration", str(math.ceil(seconds)), "--output", str(out), "--pid", str(pid)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not out.exists():
        raise StartError(
            f"py-spy can't look into process {pid}: run it as root, or allow it to trace your processes "
            f"(sysctl kernel.yama.ptrace_scope=0; in a container --cap-add SYS_PTRACE). It says: {done.stderr.strip()}"
        )
    return out.read_text().splitlines()


async def run(net: str, callers: int, seconds: float) -> None:
    """Profile each process in turn, and print what was found. Raises StartError."""
    with tempfile.TemporaryDirectory(prefix="atserving-bench-") as name:
        folder = Path(name)
        workload = WORKLOADS[net](folder)
        async with Mesh(serves=[workload.example]) as mesh:
            job = Job(f"{mesh.url}/v1/eval/{workload.name}", workload.image, callers, seconds)
            groups = machine.mesh_processes(mesh)
            seen = await asyncio.to_thread(under_load.measure, job, groups)
            cpu_us = seen.cpu_us()
            front = f"evaluator-{workload.name}-v1"
            for process in ("gate", front, f"{front} worker"):
                # py-spy takes a moment to begin; the load outlasts it.
                longer = replace(job, seconds=seconds + 60)
                sample = partial(_sample, groups[process][0], longer, seconds, folder / "stacks.txt")
                print(table(process, cpu_us.get(process, 0), await asyncio.to_thread(sample)), flush=True)
    print(f"{seen.load.per_s:,.0f} requests/s without py-spy. CPU us per request:")
    for process in under_load.busiest(cpu_us):
        print(f"{cpu_us[process]:8.1f}  {process}")
    if seen.load.errors:
        raise StartError(f"{seen.load.errors} of {seen.load.answers} requests were refused")


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
