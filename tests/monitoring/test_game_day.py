"""The faults of the game day name alerts and panels that exist, and their page shows what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from PIL import Image

from atserving.local.ports import free_ports
from monitoring import board_files, faults, game_day
from monitoring.faults import FAULTS, Fault
from monitoring.game_day import Outcome
from monitoring.grafana.draw import Data, Series, picture
from tests.monitoring.rules import rules
from tests.test_docs import anchors

each_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)


@each_fault
def test_a_fault_has_an_alert_and_panels_where_it_is_seen(fault: Fault) -> None:
    assert fault.alert in {each.name for each in rules()}
    assert [each.title for each in game_day.cut(fault)] == list(fault.panels)


@each_fault
def test_the_page_shows_the_fault_its_alert_and_its_picture(fault: Fault) -> None:
    page = game_day.PAGE.read_text()
    assert f"[{fault.what}](#{fault.name}) | `{fault.alert}` |" in page, "run make game-day"
    assert f"](game-day-{fault.name}.png)" in page
    assert fault.name in anchors(game_day.PAGE)


def test_the_table_has_what_was_measured() -> None:
    outcome = Outcome(FAULTS[0], 12.4, 3.6, ("AtServingTargetDown",))
    row = game_day.table([outcome]).splitlines()[-1]
    assert row.endswith("| `AtServingAppUnserved` | 2m | 12 s | 4 s | `AtServingTargetDown` |")


async def test_a_host_is_as_slow_as_it_is_told() -> None:
    (port,) = free_ports(1)
    async with faults.Host(port) as host, aiohttp.ClientSession() as session:
        async with session.get(host.url) as response:
            assert (response.status, response.content_type) == (200, "image/png")
        host.delay_s = 60
        with pytest.raises(TimeoutError):
            await session.get(host.url, timeout=aiohttp.ClientTimeout(0.2))


def test_every_kind_of_panel_is_drawn_with_and_without_data(tmp_path: Path) -> None:
    of_kind = {(each.kind, each.stacked): each for each in board_files.panels("mesh")}
    assert len(of_kind) == 6
    panels = [replace(each, x=4 * number, y=0, w=4, h=8) for number, each in enumerate(of_kind.values())]
    times = list(range(30))
    wave = [float(second % 7) for second in times]
    data = [
        {
            target.ref: [
                Series("first", {"app": "first", "le": "0.1"}, times, wave),
                Series("gaps", {"app": "gaps", "le": "0.2"}, times, [float("nan"), *wave[1:]]),
                Series("last", {"app": "last", "le": "+Inf"}, times, wave),
            ][: 3 if panel.kind != "stat" else 1]
            for target in panel.targets
        }
        for panel in panels
    ]
    picture(tmp_path / "full.png", list(zip(panels, data, strict=True)), 30, [(10, 20), (15, 15)])
    nothing: list[Data] = [{target.ref: [] for target in panel.targets} for panel in panels]
    picture(tmp_path / "empty.png", list(zip(panels, nothing, strict=True)), 30)
    full, empty = (Image.open(tmp_path / f"{each}.png") for each in ("full", "empty"))
    assert full.size == empty.size
    assert full.convert("RGB").tobytes() != empty.convert("RGB").tobytes()


def test_the_pictures_are_small_enough_for_a_page() -> None:
    pictures = [*game_day.PAGE.parent.glob("board-*.png"), *game_day.PAGE.parent.glob("game-day-*.png")]
    assert len(pictures) == len(board_files.NAMES) + len(FAULTS)
    assert all(each.stat().st_size < 250_000 for each in pictures)
