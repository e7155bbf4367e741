"""The comparison with other servers checks every answer, reports ratios, and notices a busy machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from atserving.local.examples import ROOT
from bench.peers import rounds
from bench.peers.figures import figures, table
from bench.peers.rounds import OURS, SHORT, Bench, Row
from bench.peers.settings import MOSEC

ROW = Row("tiny", 32, OURS, 100.0, 2.0, 3.0, 0, 0, {"gate": 60.0, "load generator": 9.0}, 0.0)


@pytest.mark.timeout(300)
def test_a_short_run_compares_the_mesh_with_its_peers(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    flags = ["--net", "tiny", "--seconds", "0.05", "--rounds", "1", "--json", str(file)]
    run = subprocess.run(
        [sys.executable, "-m", "bench.peers", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr + run.stdout
    found = json.loads(file.read_text())
    assert set(found["tiny"]) == {"c1", "c32"}
    assert set(found["tiny"]["c1"]) == {"p50_to_fastapi"}
    assert {"rate_to_mosec", "rate_to_fastapi"} < set(found["tiny"]["c32"])
    assert all(value > 0 for ratios in found["tiny"].values() for value in ratios.values())
    ours = found["cpu_us"]["tiny"]["c32"]["ours"]
    assert {"envoy", "gate", "evaluator-digits-v1", "evaluator-digits-v1 worker"} <= set(ours)
    assert (found["refused"], found["wrong"]) == (0, 0)
    assert "| net | callers | server |" in run.stdout


BROKEN = """
import sys
from dataclasses import replace
from bench.peers import __main__ as peers, servers
from bench.peers.settings import FASTAPI

# Its first answer is right, those under load are not.
command = servers.COMMANDS[FASTAPI]
servers.COMMANDS = {FASTAPI: (*command[:2], "tests.bench.broken_peer:app", *command[3:])}
peers.SHORT = replace(peers.SHORT, cases=(("tiny", 1, (FASTAPI,)),), rounds=1, seconds=0.05)
sys.argv = ["bench.peers"]
peers.main()
"""


def test_a_wrong_answer_spoils_the_run() -> None:
    # In a process of its own, as the command sets up the log.
    run = subprocess.run([sys.executable, "-c", BROKEN], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert re.search(r"0 answers were refused and \d+ wrong", run.stderr)
    assert "| tiny | 1 | fastapi | 0 |" in run.stdout


def bench(measured: Sequence[Row], seconds_left: float = 60) -> Bench:
    """A run whose measurements give these rows, of ours and mosec in each round."""
    rows = iter(measured)

    class Scripted(Bench):
        def _measure(self, net: str, callers: int, server: str) -> Row:
            row = next(rows)
            assert row.server == server
            return row

    plan = replace(SHORT, cases=(("tiny", 32, (OURS, MOSEC)),), rounds=2, budget_s=seconds_left)
    return Scripted(plan, time.monotonic(), {}, {})


def test_ratios_are_of_rows_in_one_round() -> None:
    run = bench(
        [
            ROW,
            replace(ROW, server=MOSEC, per_s=200.0),
            # The second round goes backwards, on a machine that is three times as fast.
            replace(ROW, server=MOSEC, per_s=500.0),
            replace(ROW, per_s=300.0),
        ]
    )
    run.run()
    found = figures(run)
    assert found["tiny"] == {"c32": {"rate_to_mosec": 0.55}}
    assert found["spread"] == {"tiny.c32.rate_to_mosec": [0.5, 0.6]}
    assert found["cpu_us"]["tiny"]["c32"]["mosec"]["sum"] == 60
    assert table(found).splitlines()[2:] == [
        "| tiny | 32 | ours | 200 | 2 ms | 0.06 ms | |",
        "| | | mosec | 350 | 2 ms | 0.06 ms | rate 0.55 (0.50 to 0.60) |",
    ]


def test_a_disturbed_row_is_measured_again_and_reported() -> None:
    mosec = replace(ROW, server=MOSEC)
    disturbed = [replace(mosec, others=others) for others in (0.9, 0.6, 0.8)]
    run = bench([replace(ROW, others=0.5), replace(ROW, others=0.05), *disturbed, mosec, ROW])
    run.run()
    found = figures(run)
    assert [row.others for row in run.rounds[0]] == [0.05, 0.6]
    assert (found["repeated"], [row["others"] for row in found["disturbed"]]) == (3, [0.6])


def test_no_row_is_measured_again_once_the_time_is_over() -> None:
    run = bench([replace(ROW, others=0.5), replace(ROW, server=MOSEC)], seconds_left=-1)
    run.run()
    assert (len(run.rounds), run.repeated) == (1, 0)


def test_the_short_form_has_the_ratios_that_README_shows() -> None:
    assert {(net, callers): set(servers) - {OURS} for net, callers, servers in SHORT.cases} == {
        ("tiny", 1): {"fastapi"},
        ("tiny", 32): {"mosec", "fastapi", "fastapi_processes"},
        ("mobilenet", 32): {"mosec", rounds.BARE_LOOP},
    }
