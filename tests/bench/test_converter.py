"""The benchmark of the converter measures the nets of the examples, and prints its tables in Markdown."""

from __future__ import annotations

from atserving.local.examples import FOLDER
from bench.converter import EXAMPLES, conversion_table, measure_example


def test_the_conversion_of_an_example_is_measured() -> None:
    row = measure_example(FOLDER / EXAMPLES[0])
    assert (row.net, row.weight_bytes > 50_000) == ("digits-v1", True)
    assert 0 <= row.own_peak_bytes < row.peak_bytes
    assert row.seconds > 0
    header, line, cells = conversion_table([row]).splitlines()
    assert header.startswith("| net | weights, MB | seconds |")
    assert line == "|---" * 6 + "|"
    assert cells.startswith("| digits-v1 | 0.1 | ")


def test_every_example_is_there() -> None:
    assert all((FOLDER / name).is_file() for name in EXAMPLES)
