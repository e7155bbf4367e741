"""Break a mesh under load, and show which alert tells.

`make game-day` writes the table and the pictures of docs/game-day.md. The times in the rules are divided by 60, so that
minutes pass in seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from atserving.local.mesh import Mesh
from atserving.local.ports import free_ports
from monitoring import board_files, faults, pictures, traffic
from monitoring.board_files import Panel
from monitoring.faults import FAULTS, Fault, Stage
from monitoring.grafana.draw import picture
from tests.prometheus import Prometheus, shortened

RULES = Path(__file__).parent / "rules.yaml"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "game-day.md"
_BETWEEN = re.compile(r"(?<=<!-- measured -->\n).*?(?=<!-- end -->)", re.DOTALL)

_FIRE_S, _RESOLVE_S = 120.0, 120.0
_POLL_S = 0.2
# What a picture shows before the fault and after the alert.
_BEFORE_S, _AFTER_S = 10.0, 5.0
_NUMBER_W, _LINES_W, _HEIGHT = 4, 10, 8


@dataclass(frozen=True)
class Outcome:
    """The alerts that fired for a fault, and when."""

    fault: Fault
    fired_s: float
    """How long after the fault the alert fired."""
    resolved_s: float
    """How long after it was mended the alert was over."""
    others: tuple[str, ...]
    """Other alerts that began to fire meanwhile."""


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the table of the page."""
    waits = _waits()
    lines = [
        "| what breaks | alert | the rule waits for | it fires after | over after the repair | others that fire |",
        "|---|---|---|---|---|---|",
    ]
    for each in outcomes:
        name = each.fault.alert
        others = ", ".join(f"`{other}`" for other in each.others)
        lines.append(
            f"| [{each.fault.what}](#{each.fault.name}) | `{name}` | {waits[name]} | {each.fired_s:.0f} s"
            f" | {each.resolved_s:.0f} s | {others} |"
        )
    return "\n".join(lines) + "\n"


def _waits() -> dict[str, str]:
    """Return the `for` of each alert."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule.get("for", "") for group in groups for rule in group["rules"] if "alert" in rule}


def cut(fault: Fault) -> list[Panel]:
    """Return the panels where a fault is seen, in one row."""
    known = {each.title: each for each in board_files.panels(fault.board)}
    panels, x = [], 0
    for title in fault.panels:
        panel = known[title]
        wide = _NUMBER_W if panel.kind == "stat" else _LINES_W
        panels.append(replace(panel, x=x, y=0, w=wide, h=_HEIGHT))
        x += wide
    return panels


async def _firing(prometheus: Prometheus) -> set[str]:
    return set(await prometheus.alerts())


async def _until(prometheus: Prometheus, alert: str, fires: bool, limit_s: float) -> None:
    """Wait until an alert fires, or does no longer. Raises SystemExit after the limit."""
    began = time.monotonic()
    while (alert in await _firing(prometheus)) is not fires:
        if time.monotonic() - began > limit_s:
            raise SystemExit(f"{alert} {'did not fire' if fires else 'did not end'} within {limit_s:g} s")
        await asyncio.sleep(_POLL_S)


async def _play(fault: Fault, stage: Stage, prometheus: Prometheus, folder: Path) -> Outcome:
    await _until(prometheus, fault.alert, False, _RESOLVE_S)
    before = await _firing(prometheus)
    await asyncio.sleep(_BEFORE_S)
    broken = time.time()
    await fault.break_it(stage)
    await _until(prometheus, fault.alert, True, _FIRE_S)
    fired_s = time.time() - broken
    others = await _firing(prometheus) - before - {fault.alert}
    # A picture shows the alert for a while.
    await asyncio.sleep(_AFTER_S)
    mended = time.time()
    await fault.mend_it(stage)
    await _until(prometheus, fault.alert, False, _RESOLVE_S)
    resolved_s = time.time() - mended
    await asyncio.sleep(_AFTER_S)
    begin, end = broken - _BEFORE_S, time.time()
    chosen = {**pictures.VALUES, "app": fault.app} if fault.board == "app" else pictures.VALUES
    data = []
    for panel in cut(fault):
        # A number is that of the moment before the repair.
        until = mended if panel.kind == "stat" else end
        data.append((panel, await pictures.data_of(prometheus, panel, chosen, begin, until)))
    marks = await pictures.alerts(prometheus, begin, end, fault.alert)
    lines = [(at - begin, at - begin) for at in (broken, mended)]
    await asyncio.to_thread(picture, folder / f"game-day-{fault.name}.png", data, end - begin, [*marks, *lines])
    return Outcome(fault, fired_s, resolved_s, tuple(sorted(others)))


async def _run(chosen: Sequence[Fault], folder: Path) -> list[Outcome]:
    (port,) = free_ports(1)
    async with AsyncExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        host = await stack.enter_async_context(faults.Host(port))
        serves = faults.serves(data)
        allowed = ["--allow-network", f"127.0.0.1:{port}"]
        extra = {f"evaluator-{each.app}-{each.version}": allowed for each in serves}
        extra["registry"] = ["--lease-ttl", "10s"]
        mesh = await stack.enter_async_context(Mesh(serves=serves, gates=2, extra=extra, tell=print))
        (rules := data / "rules.yaml").write_text(shortened(RULES.read_text()))
        prometheus = await stack.enter_async_context(
            Prometheus(data / "prometheus", mesh.targets(), rules, interval="500ms")
        )
        load = await stack.enter_async_context(traffic.Traffic(mesh, faults.callers(mesh, host)))
        await prometheus.until_all_up()
        stage = Stage(mesh, host, load)
        outcomes = []
        for fault in chosen:
            outcome = await _play(fault, stage, prometheus, folder)
            print(
                f"{fault.what}: {fault.alert} after {outcome.fired_s:.1f} s, over after {outcome.resolved_s:.1f} s;"
                f" others: {', '.join(outcome.others) or 'none'}",
                flush=True,
            )
            outcomes.append(outcome)
        return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [each.name for each in FAULTS]
    parser.add_argument("--only", nargs="+", choices=names, help="some of the faults; the page stays as it is then")
    parser.add_argument("--folder", type=Path, default=PAGE.parent, help="where the pictures go")
    arguments = parser.parse_args()
    chosen = [each for each in FAULTS if each.name in (arguments.only or names)]
    outcomes = asyncio.run(_run(chosen, arguments.folder))
    print(f"\n{table(outcomes)}")
    if not arguments.only and arguments.folder == PAGE.parent:
        PAGE.write_text(_BETWEEN.sub(lambda _: "\n" + table(outcomes) + "\n", PAGE.read_text()))


if __name__ == "__main__":
    main()
