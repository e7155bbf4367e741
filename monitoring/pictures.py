"""Draw every board from a mesh with load: `make board-pictures` writes docs/board-*.png."""

from __future__ import annotations

import argparse
import asyncio
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atserving.local.mesh import Mesh
from monitoring import board_files, traffic
from monitoring.board_files import Panel
from monitoring.grafana.draw import Data, Mark, Series, picture
from tests.prometheus import Prometheus

_DOCS = Path(__file__).resolve().parents[1] / "docs"
VALUES = {"namespace": ".*", "app": ".*", "version": ".*", "instance": ".*", "__rate_interval": "5s"}
"""The choices of a reader of a board: all. `digits` on the boards that show one app."""
ONE_APP = {**VALUES, "app": "digits"}


def values_of(board: str) -> Mapping[str, str]:
    """Return the values of the variables of a board."""
    return ONE_APP if board in ("app", "instance") else VALUES


async def data_of(prometheus: Prometheus, panel: Panel, values: Mapping[str, str], begin: float, end: float) -> Data:
    """Return what the queries of a panel had between two times, at each second."""
    span = {"start": str(begin), "end": str(end), "step": "1"}
    result = {}
    for target in panel.targets:
        query = board_files.filled(target.expression, values)
        answer = await prometheus.get("query_range", query=query, **span)
        result[target.ref] = [_series(target.legend, each, begin) for each in answer["result"]]
    return result


def _series(legend: str, series: Mapping[str, Any], begin: float) -> Series:
    labels = series["metric"]
    name = re.sub(r"\{\{(\w+)\}\}", lambda label: labels.get(label[1], ""), legend)
    known = {round(float(at) - begin): float(value) for at, value in series["values"]}
    # A second without a sample is a gap, not a line across it.
    times = range(min(known), max(known) + 1)
    return Series(
        " ".join(name.split()) or "(none)", labels, list(times), [known.get(at, float("nan")) for at in times]
    )


async def alerts(prometheus: Prometheus, begin: float, end: float, names: str = ".+") -> list[Mark]:
    """Return when alerts fired whose names match."""
    span = {"start": str(begin), "end": str(end), "step": "1"}
    query = f'max by (alertname) (ALERTS{{alertstate="firing", alertname=~"{names}"}})'
    answer = await prometheus.get("query_range", query=query, **span)
    return [(float(each["values"][0][0]) - begin, float(each["values"][-1][0]) - begin) for each in answer["result"]]


async def _draw(prometheus: Prometheus, board: str, path: Path, begin: float, end: float) -> None:
    values = values_of(board)
    data = [(each, await data_of(prometheus, each, values, begin, end)) for each in board_files.panels(board)]
    await asyncio.to_thread(picture, path, data, end - begin, await alerts(prometheus, begin, end))


async def _run(folder: Path, seconds: float, boards: Sequence[str]) -> None:
    serves = [*traffic.SERVES, *traffic.MORE]
    with tempfile.TemporaryDirectory() as data:
        async with Mesh(serves=serves, gates=2, tell=print) as mesh:
            await traffic.shadow(mesh, "v3")
            some = [
                *traffic.callers(mesh, 200),
                traffic.picture("digits-detect", 15, "detect/images/1.png"),
                traffic.picture("digits-segment", 6, "segment/images/1.png"),
            ]
            async with (
                Prometheus(Path(data), mesh.targets(), interval="1s") as prometheus,
                traffic.Traffic(mesh, some) as load,
            ):
                await prometheus.until_all_up()
                begin = time.time()
                print(f"Measuring for {seconds:g} s ...", flush=True)
                await _story(mesh, load, seconds)
                end = time.time()
                for board in boards:
                    await _draw(prometheus, board, folder / f"board-{board}.png", begin, end)
                    print(folder / f"board-{board}.png", flush=True)


async def _story(mesh: Mesh, load: traffic.Traffic, seconds: float) -> None:
    """Let load come and go, a worker crash, and an instance die."""
    for factor, part in ((0.5, 0.2), (1.0, 0.25), (2.0, 0.2)):
        load.factor = factor
        await asyncio.sleep(part * seconds)
    traffic.kill_worker(mesh, "evaluator-digits-v1")
    await asyncio.sleep(0.1 * seconds)
    load.factor = 1.0
    mesh.kill_process("evaluator-digits-v2")
    await asyncio.sleep(0.25 * seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90, help="how long to measure")
    parser.add_argument("--folder", type=Path, default=_DOCS, help="where the pictures go")
    parser.add_argument(
        "--boards", nargs="+", choices=board_files.NAMES, default=board_files.NAMES, help="some of them"
    )
    arguments = parser.parse_args()
    asyncio.run(_run(arguments.folder, arguments.seconds, arguments.boards))


if __name__ == "__main__":
    main()
