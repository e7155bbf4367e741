"""Try settings of the peers: which is the fastest with 32 callers on this machine?

python -m bench.peers.tune [--peer mosec|fastapi] [--net tiny|mobilenet] [--seconds 1] [--rounds 2]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from atserving.errors import StartError
from atserving.local.foreground import run_until_stopped
from bench.peers.rounds import NETS, prepare
from bench.peers.servers import Case, running_peer
from bench.peers.settings import TRIED, Settings
from bench.under_load import Measured, measure, undisturbed

_CALLERS = 32


async def _measure(peer: str, case: Case, settings: Settings, seconds: float, folder: Path) -> Measured:
    async with running_peer(peer, case, settings, folder) as server:
        await asyncio.to_thread(server.check)
        job = server.job(_CALLERS, seconds)
        # Its processes start one by one, and the first one answers early.
        await asyncio.to_thread(measure, job, {})
        row, _ = await asyncio.to_thread(undisturbed, partial(measure, job, server.processes()))
    if row.load.errors:
        raise StartError(f"{peer} with {settings}: {row.load.errors} answers were refused or wrong")
    return row


async def run(peers: Sequence[str], nets: Sequence[str], seconds: float, rounds: int) -> None:
    """Measure every setting once in each round, and print the medians, the fastest first. Raises StartError."""
    with tempfile.TemporaryDirectory(prefix="atserving-bench-") as name:
        folder = Path(name)
        for net in nets:
            case = prepare(net, folder)[0]
            for peer in peers:
                rates: dict[Settings, list[float]] = {}
                for _ in range(rounds):
                    for settings in TRIED[peer]:
                        row = await _measure(peer, case, settings, seconds, folder)
                        rates.setdefault(settings, []).append(row.load.per_s)
                print(f"{net}, {peer}:")
                for settings in sorted(rates, key=lambda each: -statistics.median(rates[each])):
                    print(f"{statistics.median(rates[settings]):9,.0f}/s  {settings}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peer", choices=list(TRIED), action="append", help="only this peer (default: all)")
    parser.add_argument("--net", choices=list(NETS), action="append", help="only this net (default: all)")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each setting takes (default: 1)")
    parser.add_argument("--rounds", type=int, default=2, help="how often each is measured (default: 2)")
    arguments = parser.parse_args()
    peers, nets = arguments.peer or list(TRIED), arguments.net or list(NETS)
    try:
        run_until_stopped(run(peers, nets, arguments.seconds, arguments.rounds))
    except (StartError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
