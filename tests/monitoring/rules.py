"""The rules of `monitoring/rules.yaml`, and what their tests expect of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "monitoring"
RULES = FOLDER / "rules.yaml"
TESTS = (FOLDER / "rules_test.yaml", FOLDER / "budgets_test.yaml")

JOBS = {"gate", "evaluator", "registry", "envoy", "etcd"}
"""The values of the label job."""

_NOT_NAMES = re.compile(r"\b(?:by|on|ignoring|group_left|group_right) \([^)]*\)|\[[^]]*\]|\"[^\"]*\"|#.*")
_NAME = re.compile(r"(?<![\w:])(?:(?:atserving|envoy|etcd|process)_[a-z0-9_]+|up)(?![\w:])")
_SELECTOR = re.compile(r"([a-z_:]*)\{([^}]*)\}")
_BY = re.compile(r"\bby \(([^)]*)\)")


@dataclass(frozen=True)
class Rule:
    """One recording or alert rule."""

    name: str
    expression: str
    is_alert: bool
    labels: Mapping[str, str]
    annotations: Mapping[str, str]

    def metrics(self) -> dict[str, set[str]]:
        """Return the metrics of processes that it reads, as regular expressions, with the labels that it selects by."""
        text = self.expression
        found: dict[str, set[str]] = {}
        for name, matchers in _SELECTOR.findall(text):
            by_label = dict(re.findall(r'(\w+) *(?:=~|!~|!=|=) *"([^"]*)"', matchers))
            pattern = by_label.pop("__name__", name)
            if ":" not in pattern:
                found.setdefault(pattern, set()).update(by_label)
        for name in _NAME.findall(_NOT_NAMES.sub("", _SELECTOR.sub("", text))):
            found.setdefault(name, set())
        return found

    def labels_in_texts(self) -> set[str]:
        """Return the labels that the texts of an alert have."""
        return set(re.findall(r"\$labels\.(\w+)", " ".join(self.annotations.values())))

    def grouped_by(self) -> set[str]:
        """Return the labels that it groups by."""
        return {label for labels in _BY.findall(self.expression) for label in labels.split(", ")}


@cache
def rules() -> tuple[Rule, ...]:
    """Return all rules."""

    def read() -> Iterator[Rule]:
        for group in yaml.safe_load(RULES.read_text())["groups"]:
            for each in group["rules"]:
                name = each.get("alert") or each["record"]
                yield Rule(name, each["expr"], "alert" in each, each.get("labels", {}), each.get("annotations", {}))

    return tuple(read())


def alerts() -> list[Rule]:
    """Return the alert rules."""
    return [each for each in rules() if each.is_alert]


@dataclass(frozen=True)
class Expectation:
    """The alerts of one name that a test expects at a time."""

    alert: str
    fires: tuple[Mapping[str, str], ...]
    """The labels of those that fire."""


@cache
def unit_tests() -> tuple[dict[str, Any], ...]:
    """Return all unit tests, as promtool reads them."""
    return tuple(each for file in TESTS for each in yaml.safe_load(file.read_text())["tests"])


@cache
def expectations() -> tuple[Expectation, ...]:
    """Return all expectations of alerts in the unit tests."""

    def read() -> Iterator[Expectation]:
        for check in (check for each in unit_tests() for check in each["promql_expr_test"]):
            if found := re.match(r'ALERTS\{alertname="(\w+)", alertstate="firing"\}', check["expr"]):
                samples = (each["labels"] for each in check.get("exp_samples", []))
                labels = (dict(re.findall(r'(\w+)="([^"]*)"', each)) for each in samples)
                yield Expectation(found[1], tuple(labels))

    return tuple(read())
