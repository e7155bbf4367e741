"""The benchmarks print their results as tables in Markdown."""

from __future__ import annotations

from bench import mesh
from bench.converter import Comparison, comparison_table


def test_comparisons_with_pytorch_are_rows() -> None:
    row = Comparison("mobilenet_v1", 8, 57, 58, 50.04, 50.06, 0.9996, 1.23e-6)
    assert comparison_table([row]).splitlines()[-1] == "| mobilenet_v1 | 8 | 57 | 58 | 50.0 | 50.1 | 1.000 | 1.2e-06 |"


def test_the_mesh_has_a_row_per_number_of_callers() -> None:
    rows = [
        mesh.Row("edge alone", 1, 9000.0, 0.1, 0.2, 0, {"envoy": 0.05}, {}, {}, 0),
        mesh.Row("digits", 1, 662.4, 1.5, 1.84, 0, {"gate": 0.61, "envoy": 0.4}, {}, {}, 0),
        mesh.Row("digits", 32, 1759.0, 118.9, 1327.0, 0, {"gate": 0.37}, {}, {}, 0),
    ]
    assert mesh.table(rows).splitlines() == [
        "| callers | requests/s | p50 | p99 | CPU per request |",
        "|---|---|---|---|---|",
        "| 1 | 662 | 1.5 ms | 1.8 ms | 1 ms |",
        "| 32 | 1,759 | 119 ms | 1,327 ms | 0.37 ms |",
    ]
