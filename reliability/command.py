"""The command line of both programs: choose scenarios, play them, print the table."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from atserving.errors import StartError
from atserving.local.foreground import run_until_stopped
from bench.machine import Moment
from reliability import before, pods
from reliability.mesh import Mesh
from reliability.releases import Served
from reliability.report import Row, markdown
from reliability.scenario import Scenario, play
from reliability.truth import learn


def main(what: str, scenarios: Sequence[Scenario], serves: Callable[[Path], Sequence[Served]]) -> None:
    """Play the scenarios that the command line chooses. Exits with 1 if one failed or lost too much."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--only", nargs="+", metavar="PATTERN", default=["*"], help="scenarios, such as '*frozen*'")
    parser.add_argument("--scale", type=float, default=1.0, help="shorten each scenario, such as 0.5 (default: 1)")
    parser.add_argument("--pod-limits", action="store_true", help="run Envoy and gates at the limits of k8s/base")
    parser.add_argument("--markdown", action="store_true", help="print the rows of docs/reliability.md in the end")
    parser.add_argument("--list", action="store_true", help="print the names of the scenarios")
    arguments = parser.parse_args()
    chosen = [each for each in scenarios if any(fnmatch(each.name, pattern) for pattern in arguments.only)]
    if arguments.list or not chosen:
        raise SystemExit("\n".join(each.name for each in scenarios))
    rows: list[Row] = []
    try:
        run_until_stopped(_run(chosen, serves, arguments.scale, arguments.pod_limits, rows))
    except (StartError, OSError) as error:
        raise SystemExit(str(error)) from None
    if arguments.markdown:
        print(f"\n{markdown(rows, before.MEASURED)}", flush=True)
    complaints = [row.complaint for row in rows if row.complaint]
    if complaints or not rows:
        raise SystemExit("; ".join(complaints) or "nothing was played")


async def _run(
    scenarios: Sequence[Scenario],
    serves: Callable[[Path], Sequence[Served]],
    scale: float,
    pod_limits: bool,
    rows: list[Row],
) -> None:
    print(_head(pods.limits() if pod_limits else {}), flush=True)
    async with Mesh(serves, pod_limits=pod_limits) as mesh:
        truth = await learn(mesh)
        for scenario in scenarios:
            began = Moment.now()
            row = await play(scenario, mesh, truth, scale)
            others = (await asyncio.to_thread(Moment.now)).others_since(began)
            print(f"{row}\n    others used {others:g} cores", flush=True)
            rows.append(row)


def _head(limits: Mapping[str, int]) -> str:
    if not limits:
        return "Envoy and gates run without a memory limit."
    return ", ".join(f"{kind}: at most {size >> 20} MiB" for kind, size in limits.items()) + ", as in k8s/base."
