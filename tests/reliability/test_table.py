"""Both programs print a table, whose rows a document can hold."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from atserving.local.examples import ROOT
from reliability import attack, before, chaos
from reliability.report import Allowance, Row, markdown

ROW = Row(
    name="gate killed",
    sent=1200,
    answered=1194,
    failed={"503 no gate is ready": 1, "429 every instance is full": 3},
    apart=2,
    worst_s=1.26,
    agreed_s=2.04,
    peak_mib={"envoy": 60, "gate": 50, "front": 61, "worker": 95, "registry": 46, "etcd": 30, "files": 9},
    notes=["first", "a | b"],
)


def test_a_row_has_the_causes_of_failures_and_the_peak_of_each_kind() -> None:
    assert markdown([ROW], {}).splitlines() == [
        "| scenario | sent | answered | failed | slowest | agreed "
        "| peak MiB: envoy, gate, front, worker, registry, etcd | before | notes |",
        "|---|---|---|---|---|---|---|---|---|",
        "| gate killed | 1,200 | 1,194 | 3 x 429 every instance is full; 1 x 503 no gate is ready; "
        "apart: 2 of the broken Envoy's own | 1.3 s | 2 s | 60, 50, 61, 95, 46, 30 | | first; a \\| b |",
    ]


def test_a_row_has_what_was_measured_before() -> None:
    row = markdown([ROW], {"gate killed": "0 failed"}).splitlines()[-1]
    assert "| 0 failed | first;" in row


def test_failures_at_the_broken_envoy_are_not_lost_requests() -> None:
    assert ROW.lost == 4


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (replace(ROW, failed={}), ""),
        (ROW, "gate killed: 4 requests lost"),
        (replace(ROW, allowed=Allowance(4, "why")), ""),
        (replace(ROW, allowed=Allowance(3, "why")), "gate killed: 4 requests lost, of which 3 are allowed"),
        (replace(ROW, failed={}, whole=False, allowed=Allowance(3, "why")), "gate killed: it failed, see its notes"),
    ],
)
def test_a_row_that_lost_more_than_is_allowed_has_a_complaint(row: Row, complaint: str) -> None:
    assert row.complaint == complaint


def test_a_row_shows_losses_that_are_allowed() -> None:
    allowed = Allowance(3, "while the gate starts")
    assert "| 0; allowed: 3, while the gate starts |" in markdown(
        [replace(ROW, failed={}, apart=0, allowed=allowed)], {}
    )
    assert "allowed" not in markdown([ROW], {})


def test_every_scenario_that_may_lose_requests_says_why() -> None:
    for each in (*chaos.scenarios(), *attack.scenarios()):
        assert bool(each.allowed.requests) == bool(each.allowed.why)


def test_every_earlier_measurement_belongs_to_a_scenario() -> None:
    names = [each.name for each in (*chaos.scenarios(), *attack.scenarios())]
    assert len(names) == len(set(names))
    assert not before.MEASURED.keys() - set(names)


@pytest.mark.parametrize("program", ["chaos", "attack"])
def test_an_unknown_scenario_gets_the_list_of_all(program: str) -> None:
    command = [sys.executable, "-m", f"reliability.{program}", "--only", "no such scenario"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    scenarios = {"chaos": chaos.scenarios, "attack": attack.scenarios}[program]()
    assert run.stderr.splitlines() == [each.name for each in scenarios]
