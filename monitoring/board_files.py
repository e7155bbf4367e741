"""The panels in the files of the boards, and their expressions for Prometheus with the variables filled in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "boards"
NAMES = ("mesh", "app", "instance", "registry")


@dataclass(frozen=True)
class Target:
    """One query of a panel."""

    ref: str
    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One panel of a board, or the title of a section (``kind`` is ``row``)."""

    kind: str
    title: str
    description: str
    x: int
    y: int
    w: int
    h: int
    unit: str
    stacked: bool
    top: float | None
    limits: tuple[tuple[float, str], ...]
    targets: tuple[Target, ...]
    columns: Mapping[str, tuple[str, str]]
    """The name and the unit of the column of each query of a table."""


def panels(name: str) -> list[Panel]:
    """Return the panels of the board in `boards/<name>.json`."""
    return [_panel(each) for each in json.loads((FOLDER / f"{name}.json").read_text())["panels"]]


def filled(expression: str, values: Mapping[str, str]) -> str:
    """Return an expression with a value for each variable. Raises KeyError for one without a value."""
    return re.sub(r"\$(\w+)", lambda name: values[name[1]], expression)


def _panel(panel: Mapping[str, Any]) -> Panel:
    field = panel.get("fieldConfig", {})
    defaults = field.get("defaults", {})
    steps = defaults.get("thresholds", {}).get("steps", [])
    place = panel["gridPos"]
    return Panel(
        kind=panel["type"],
        title=panel["title"],
        description=panel.get("description", ""),
        **{key: place[key] for key in "xywh"},
        unit=defaults.get("unit", "short"),
        stacked=defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal",
        top=defaults.get("max"),
        limits=tuple((step["value"], step["color"]) for step in steps if step["value"] is not None),
        targets=tuple(
            Target(each["refId"], each["expr"], each.get("legendFormat", "")) for each in panel.get("targets", [])
        ),
        columns=_columns(panel, field.get("overrides", [])),
    )


def _columns(panel: Mapping[str, Any], overrides: list[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    units = {
        each["matcher"]["options"]: str(one["value"])
        for each in overrides
        for one in each["properties"]
        if one["id"] == "unit"
    }
    names = {
        old: str(new)
        for each in panel.get("transformations", [])
        for old, new in each["options"].get("renameByName", {}).items()
    }
    return {old.removeprefix("Value #"): (new, units[new]) for old, new in names.items() if old.startswith("Value #")}
