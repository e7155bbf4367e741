"""Measure the converter's accuracy and write docs/converter-accuracy.md: `python -m tests.caffe.report [BENCH.json]`.

Times and memory come from BENCH.json, which `python -m bench.converter --json` writes. Without that file, the page
keeps its section on them.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluator.caffe import convert

from .boxes import rows
from .nets import FIXTURES, MODELS, Array, draw_weights, error, normal, run, session, write_net
from .oracle import opencv_outputs
from .test_models import NETWORKS, STRUCTURES, smaller

OUTPUT = Path(__file__).parents[2] / "docs" / "converter-accuracy.md"
HEAD = """# Accuracy of the converter

This page shows how far the converter's models differ from real Caffe, and what a conversion costs. `python -m
tests.caffe.report` measures the figures and writes the page. An error is the largest difference from the oracle,
relative to the largest value of the output, over all outputs of all cases. All models run in onnxruntime on a CPU in
float32. The tests in `tests/caffe` allow an error of 1e-5 for single layers and 1e-4 for whole networks.

"""


def compared(actual: Array, expected: Array) -> float:
    if actual.ndim == 4 and actual.shape[-1] == 7:
        return error(rows(actual), rows(expected))
    return error(actual, expected)


def fixtures() -> list[str]:
    """Return one row per family of fixtures. The family is the first word of the name, after any "declared<B>_"."""
    errors: dict[str, list[float]] = defaultdict(list)
    cases: dict[str, int] = defaultdict(int)
    for folder in sorted(FIXTURES.iterdir()):
        words = folder.name.removeprefix("declared2_").removeprefix("declared10_").split("_")
        family = "cv_" + words[1] if words[0] == "cv" else words[0]
        engine = session(convert(folder / "deploy.prototxt", folder / "weight.caffemodel"))
        cases[family] += 1
        with np.load(folder / "expected.npz") as stored:
            for batch in sorted({key.split("|")[0] for key in stored.files}):
                feeds = {key.split("|")[2]: stored[key] for key in stored.files if key.startswith(f"{batch}|in")}
                outputs = run(engine, feeds) if feeds else {}
                errors[family] += [
                    compared(outputs[blob], stored[f"{batch}|out|{blob}"])
                    for blob in outputs
                    if f"{batch}|out|{blob}" in stored.files
                ]
    lines = ["## Layers", "", "| fixtures | cases | largest error | oracle |", "|---|---|---|---|"]
    for family, found in errors.items():
        oracle = "OpenCV 4" if family.startswith("cv_") else "BVLC Caffe"
        lines.append(f"| {family.removeprefix('cv_')} | {cases[family]} | {max(found):.1e} | {oracle} |")
    return [*lines, ""]


def networks() -> list[str]:
    lines = ["## Trained networks", "", "| network | nodes | largest error | oracle |", "|---|---|---|---|"]
    for name in NETWORKS:
        folder = MODELS / name
        model = convert(folder / "deploy.prototxt", folder / "weight.caffemodel")
        engine = session(model)
        found = []
        with np.load(folder / "expected.npz") as stored:
            for case in ("img1", "rand1"):
                outputs = run(engine, {engine.get_inputs()[0].name: stored[f"{case}|in"]})
                found += [compared(array, stored[f"{case}|out|{blob}"]) for blob, array in outputs.items()]
        oracle = "OpenCV 4, without its padding rows" if name.startswith("yuface") else "BVLC Caffe"
        lines.append(f"| {name} | {len(model.graph.node)} | {max(found):.1e} | {oracle} |")
    return [*lines, ""]


def structures() -> list[str]:
    lines = [
        "## Structures with random weights",
        "",
        "ENet and YOLOv5s run on smaller images. Blobs before a softmax are compared too.",
        "",
        "| structure | nodes | largest error | oracle |",
        "|---|---|---|---|",
    ]
    for name, (blobs, replacements) in STRUCTURES.items():
        prototxt = smaller((MODELS / "structures" / f"{name}.prototxt").read_text(), replacements)
        weights = draw_weights(prototxt)
        with tempfile.TemporaryDirectory() as folder:
            paths = write_net(Path(folder), prototxt, weights)
            nodes = len(convert(*paths).graph.node)
            engine = session(convert(*paths, outputs=blobs))
            image = {engine.get_inputs()[0].name: normal(1, *engine.get_inputs()[0].shape[1:])}
            outputs = run(engine, image)
            expected = opencv_outputs(Path(folder), prototxt, weights, image, list(outputs))
        worst = max(compared(array, expected[blob]) for blob, array in outputs.items())
        lines.append(f"| {re.sub('_deploy.*', '', name)} | {nodes} | {worst:.1e} | OpenCV 4 |")
    return [*lines, ""]


COST = "## Time and memory\n"


def cost(figures: list[dict[str, Any]]) -> str:
    lines = [
        COST,
        "`make bench-converter` measures these figures on two shared cores. They are medians over conversions in fresh",
        "processes, without the start of the interpreter and its imports. Memory is the peak of resident memory; the",
        "interpreter with its packages accounts for about 45 MB of it.",
        "",
        "| net | weights, MB | seconds | peak memory, MB | conversion's share, MB | share / weights |",
        "|---|---|---|---|---|---|",
    ]
    for row in figures:
        if "seconds" in row:
            sizes = [row[key] / 1e6 for key in ("weight_bytes", "peak_bytes", "own_peak_bytes")]
            ratio = f"{sizes[2] / sizes[0]:.1f}" if sizes[0] > 10 else ""
            lines.append(
                f"| {row['net']} | {sizes[0]:.1f} | {row['seconds']:.2f} | {sizes[1]:.0f} | {sizes[2]:.0f} | {ratio} |"
            )
    lines += [
        "",
        "The next table compares our models with PyTorch's exports of the same nets with the same weights. Both run in",
        "turns in onnxruntime, on one thread with the same options. The ratio is our time divided by PyTorch's, the",
        "median over pairs of runs, with an uncertainty of about 0.01. Both exports fold every BatchNorm. After",
        "onnxruntime's optimizations, the graphs of ResNet-50 have equally many operators. Our MobileNet v1 has two",
        "fewer: GlobalAveragePool keeps the memory layout of the convolutions, PyTorch's ReduceMean does not.",
        "",
        "| net | batch | nodes | PyTorch's nodes | ms | PyTorch's ms | ratio | outputs differ by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['net']} | {row['batch']} | {row['our_nodes']} | {row['their_nodes']} | {row['our_ms']:.1f} "
        f"| {row['their_ms']:.1f} | {row['ratio']:.3f} | {row['difference']:.1e} |"
        for row in figures
        if "ratio" in row
    ]
    return "\n".join([*lines, "", ""])


def cost_kept() -> str:
    """Return the page's current section on time and memory."""
    _, _, after = OUTPUT.read_text().partition(COST)
    return COST + after.partition("\n## ")[0] + "\n" if after else ""


class Recorder:
    """A pytest plugin that records the largest error and the number of cases of each test."""

    def __init__(self) -> None:
        self.worst: dict[str, float] = {}
        self.cases: dict[str, int] = defaultdict(int)
        self._test = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        for module in {item.module for item in items}:
            module.error = self._measured

    def pytest_runtest_call(self, item: pytest.Function) -> None:
        layer = "detection output " if "detection_output" in item.module.__name__ else ""
        self._test = layer + item.originalname.removeprefix("test_").replace("_", " ")
        self.cases[self._test] += 1

    def _measured(self, actual: Array, expected: Array) -> float:
        found = error(actual, expected)
        self.worst[self._test] = max(found, self.worst.get(self._test, 0.0))
        return found


def definitions() -> list[str]:
    """Return one row per test of the layers without a fixture."""
    recorder = Recorder()
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("published_layers", "detection_output")]
    with contextlib.redirect_stdout(sys.stderr):
        status = pytest.main(["-q", "-p", "no:cacheprovider", *files], plugins=[recorder])
    if status != pytest.ExitCode.OK:
        raise SystemExit("a layer differs from its definition")
    lines = [
        "## Layers against their definitions",
        "",
        "The Caffe oracle does not support these layers. `test_published_layers.py` and `test_detection_output.py`",
        "compare them with their published definitions in plain NumPy, or with OpenCV 4 if the test's name says so.",
        "",
        "| test | cases | largest error |",
        "|---|---|---|",
    ]
    for test, worst in recorder.worst.items():
        lines.append(f"| {test} | {recorder.cases[test]} | {worst:.1e} |")
    return [*lines, ""]


if __name__ == "__main__":
    page = HEAD + "\n".join([*fixtures(), *definitions(), *networks(), *structures()]) + "\n"
    page += cost(json.loads(Path(sys.argv[1]).read_text())) if sys.argv[1:] else cost_kept()
    OUTPUT.write_text(page.rstrip() + "\n")
