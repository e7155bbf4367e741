"""Measure the whole mesh beside mosec, FastAPI and a bare loop, on the same nets and pictures, by turns.

    python -m bench.peers [--full] [--json FILE]

Each answers HTTP requests with a picture in the body; the bare loop receives nothing. All share this machine with the
load generator. Every answer is checked. Compare the ratios of one run, never figures of different machines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from atserving.errors import StartError
from atserving.local.foreground import run_until_stopped
from bench.bare_loop import BareLoop, Setting
from bench.peers.figures import figures, table
from bench.peers.rounds import BARE_LOOP, FULL, NETS, OURS, SHORT, Bench, Plan, prepare
from bench.peers.servers import Server, running_mesh, running_peer
from bench.peers.settings import BEST


async def run(plan: Plan, began_s: float, result: dict[str, Any]) -> None:
    """Start every server, measure in rounds, and fill ``result`` with the figures. Raises StartError."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="atserving-bench-")))
        prepared = {net: await asyncio.to_thread(prepare, net, folder) for net in plan.nets}
        servers: dict[tuple[str, str], Server] = {}
        for net, (case, _) in prepared.items():
            for name in plan.servers(net):
                if (name, net) in BEST:
                    peer = running_peer(name, case, BEST[name, net], folder)
                    servers[net, name] = await stack.enter_async_context(peer)
        ours = [case for net, (case, _) in prepared.items() if OURS in plan.servers(net)]
        if ours:
            for server in await stack.enter_async_context(running_mesh(ours)):
                servers[server.case.name, OURS] = server
        for server in servers.values():
            await asyncio.to_thread(server.check)
        loops: dict[str, tuple[BareLoop, Setting]] = {}
        for net, (_, loop) in prepared.items():
            if BARE_LOOP in plan.servers(net):
                loops[net] = loop, (await asyncio.to_thread(loop.best, plan.seconds / 8, decodes=True))[0]
        bench = Bench(plan, began_s, servers, loops)
        await asyncio.to_thread(bench.run)
        result.update(figures(bench))


def report(found: Mapping[str, Any]) -> None:
    """Print the figures. Raises SystemExit if a server gave a wrong answer, or none."""
    if found["repeated"]:
        print(f"{found['repeated']} rows were measured again, as other processes used more than a tenth of a core.")
    for row in found["disturbed"]:
        print(f"still disturbed: {row['net']}, {row['callers']} callers, {row['server']}: others {row['others']} cores")
    print(f"\n{table(found)}", flush=True)
    if found["refused"] or found["wrong"]:
        raise SystemExit(f"{found['refused']} answers were refused and {found['wrong']} wrong: the run is spoilt")


def main() -> None:
    began_s = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true", help="more callers, more servers, longer and more often")
    parser.add_argument("--net", choices=list(NETS), action="append", help="only this net (default: all)")
    parser.add_argument("--seconds", type=float, help="how long each row takes (default: 0.8, with --full 3)")
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
    found: dict[str, Any] = {}
    try:
        run_until_stopped(run(plan, began_s, found))
    except (StartError, OSError) as error:
        raise SystemExit(str(error)) from None
    if not found:
        raise SystemExit(1)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    report(found)


if __name__ == "__main__":
    main()
