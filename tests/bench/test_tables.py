"""The benchmarks print their results as tables in Markdown."""

from __future__ import annotations

from dataclasses import replace

from bench import mesh, profile
from bench.converter import Comparison, comparison_table


def test_comparisons_with_pytorch_are_rows() -> None:
    row = Comparison("mobilenet_v1", 8, 57, 58, 50.04, 50.06, 0.9996, 1.23e-6)
    assert comparison_table([row]).splitlines()[-1] == "| mobilenet_v1 | 8 | 57 | 58 | 50.0 | 50.1 | 1.000 | 1.2e-06 |"


def test_the_mesh_has_a_row_per_number_of_callers() -> None:
    row = mesh.Row("digits", 1, 662.4, 1.5, 1.84, 0, 0, {"gate": 610.0, "envoy": 400.0}, {}, {}, {}, 0.0)
    rows = [
        replace(row, name="edge alone", per_s=9000.0),
        row,
        replace(row, callers=32, per_s=1759.0, p50_ms=118.9, p99_ms=1327.0, cpu_us={"gate": 370.0}),
    ]
    assert mesh.table(rows).splitlines() == [
        "| callers | requests/s | p50 | p99 | CPU per request |",
        "|---|---|---|---|---|",
        "| 1 | 662 | 1.5 ms | 1.8 ms | 1 ms |",
        "| 32 | 1,759 | 119 ms | 1,327 ms | 0.37 ms |",
    ]


def test_a_profile_has_the_time_of_a_function_and_of_those_it_calls() -> None:
    stacks = [
        "main (gate.py:1);route (router.py:2) 6",
        "main (gate.py:1);route (router.py:7);pick (router.py:9) 2",
        "main (gate.py:3) 2",
        # A thread that waits.
        "run (threading.py:1);wait (threading.py:320) 90",
    ]
    assert profile.table("gate", 50.0, stacks).splitlines() == [
        "gate: 50 us of CPU per request",
        "  own us     own  total us   total  function",
        "    30.0   60.0%      40.0   80.0%  route (router.py)",
        "    10.0   20.0%      10.0   20.0%  pick (router.py)",
        "    10.0   20.0%      50.0  100.0%  main (gate.py)",
    ]
