"""The benchmark of one evaluator runs from a clone and reports every figure."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench import workload
from tests.evaluator.built_in import config, loaded

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("atserving", "bench", "evaluator", "examples", "gate", "registry")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the packages of a clone: no tests, and nothing beside the repository."""
    folder = tmp_path / "clone"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


# It starts four processes, which takes long on a busy machine.
@pytest.mark.timeout(300)
def test_a_short_run_in_a_clone_reports_every_figure(clone: Path) -> None:
    flags = ["--net", "digits", "--seconds", "0.02", "--rounds", "1", "--json", str(clone / "figures.json")]
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    run = subprocess.run(
        [sys.executable, "-m", "bench.evaluator", *flags],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads((clone / "figures.json").read_text())
    for callers in (1, 8, 32, 64):
        assert figures[f"digits.c{callers}.errors"] == 0
        for name in ("per_s", "p50_ms", "p99_ms", "ratio_to_bare_loop"):
            assert figures[f"digits.c{callers}.{name}"] > 0
    assert {row["net"] for row in figures["rows"]} == {"digits"}
    header, line, *rows = run.stdout.splitlines()[-6:]
    assert header.startswith("| net, image | callers | requests/s | p50 | p99 |")
    assert line == "|---" * 7 + "|"
    assert [row.split(" | ")[1].strip("| ") for row in rows] == ["1", "8", "32", "64"]
    assert rows[0].endswith("ms more at the median |")
    assert rows[1].endswith("of its rate |")


def test_the_release_of_mobilenet_answers_its_image(tmp_path: Path) -> None:
    made = workload.mobilenet(tmp_path)
    with tarfile.open(made.tar) as tar:
        tar.extractall(tmp_path / "release", filter="data")
    files = {path.name: path for path in (tmp_path / "release").iterdir()}
    net = loaded("classify", config(files, **made.custom_values))
    req = net.preprocess({"data": {"uri": "", "body": made.image}, "params": {"limit": 1000}})
    (ret,) = net.infer("r", [req])
    assert (ret["code"], ret["message"]) == (0, "")
    assert len(ret["result"]["confidences"]) == 1000
