"""The files of the boards are current, keep Grafana's schema, and explain themselves."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from monitoring import board_files
from monitoring.grafana.__main__ import files

BUILT_IN = {"__all", "__rate_interval", "__field", "__value", "__url_time_range"}

boards = pytest.mark.parametrize("name", board_files.NAMES)


def content(name: str) -> dict[str, Any]:
    board: dict[str, Any] = json.loads((board_files.FOLDER / f"{name}.json").read_text())
    return board


def test_the_files_are_current() -> None:
    fresh = files()
    assert set(fresh) == {path.name for path in board_files.FOLDER.iterdir()}
    stale = [name for name, text in fresh.items() if (board_files.FOLDER / name).read_text() != text]
    assert not stale, "run make boards"


@boards
def test_a_board_keeps_the_schema_of_grafana(name: str) -> None:
    """Reading it by the types of Grafana's library loses nothing."""
    register_default_plugins()
    board = content(name)
    (alerts,) = board["annotations"]["list"]
    # Prometheus' annotations have these beside the schema.
    assert [alerts.pop(name) for name in ("titleFormat", "tagKeys")] == ["{{alertname}}", "severity"]
    assert alerts.pop("textFormat")
    read = json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder))
    for each in read["panels"]:
        if each["type"] == "heatmap":
            # Reading adds it.
            assert each["fieldConfig"]["defaults"].pop("custom") == {}
    assert read == board


@boards
def test_a_board_has_an_id_of_its_own_and_places_for_its_panels(name: str) -> None:
    board = content(name)
    assert (board["uid"], board["tags"]) == (f"atserving-{name}", ["atserving"])
    panels = board["panels"]
    assert len({each["id"] for each in panels}) == len(panels)
    taken: dict[tuple[int, int], str] = {}
    for each in panels:
        place = each["gridPos"]
        assert place["x"] + place["w"] <= 24
        for cell in (
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ):
            assert taken.setdefault(cell, each["title"]) == each["title"], "two panels overlap"


@boards
def test_every_panel_says_what_to_look_for(name: str) -> None:
    for each in board_files.panels(name):
        assert each.kind == "row" or (len(each.description.split()) > 3 and each.targets), each.title


@boards
def test_every_variable_in_use_is_defined(name: str) -> None:
    board = content(name)
    defined = {each["name"] for each in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board)))
    assert used - BUILT_IN <= defined
    assert defined <= used | {"datasource"}, "a variable that no panel uses"


@boards
def test_links_lead_to_boards_that_have_their_variables(name: str) -> None:
    for uid, query in re.findall(r'"/d/([\w-]+)\?([^"]+)"', json.dumps(content(name))):
        target = content(uid.removeprefix("atserving-"))
        variables = {each["name"] for each in target["templating"]["list"]}
        assert set(re.findall(r"var-(\w+)=", query)) <= variables


@boards
def test_every_series_is_named_by_labels_that_its_query_keeps(name: str) -> None:
    for panel in board_files.panels(name):
        for target in panel.targets:
            for label in re.findall(r"\{\{(\w+)\}\}", target.legend):
                by = re.findall(r"by \(([^)]*)\)", target.expression)
                assert not by or any(label in kept.split(", ") for kept in by), f"{panel.title}: {label}"


@boards
def test_sums_of_what_several_processes_tell_keep_meshes_apart(name: str) -> None:
    """All gates and registries tell of the same instances: the most of them counts, in each mesh."""
    for panel in board_files.panels(name):
        for target in panel.targets:
            inner = re.search(r"^(?:sum|count).*max by \(([^)]*)\)", target.expression)
            assert not inner or "namespace" in inner[1], f"{panel.title}: {target.expression}"


def test_latency_shows_traces() -> None:
    for name in ("mesh", "app", "instance"):
        with_exemplars = [
            panel["title"]
            for panel in content(name)["panels"]
            if any(each.get("exemplar") for each in panel.get("targets", []))
        ]
        assert len(with_exemplars) >= 2


def test_runbooks_name_panels_that_are_there() -> None:
    page = " ".join((board_files.FOLDER.parents[1] / "docs" / "alerts.md").read_text().split())
    named = re.findall(r"\*(\w+): ([^*]+)\*", page)
    assert len(named) > 30
    titles = {name: {each.title for each in board_files.panels(name)} for name in board_files.NAMES}
    assert not [f"{name}: {title}" for name, title in named if title not in titles[name]]
