"""Measures the converter and writes docs/converter-accuracy.md: `python -m tests.caffe.report [BENCH.json]`.

Times and memory come from the file that `python -m bench.converter --json` wrote; without it the page keeps its own.
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

from .nets import FIXTURES, MODELS, draw_weights, error, normal, run, session, write_net
from .oracle import opencv_outputs
from .test_models import NETWORKS, STRUCTURES, rows, smaller

OUTPUT = Path(__file__).parents[2] / "docs" / "converter-accuracy.md"
HEAD = """# How exact the converter is

Measured by `python -m tests.caffe.report`, which writes this page: the largest difference to the oracle, relative to
the largest value of the output, over all outputs of all cases. Everything runs in onnxruntime on a CPU in float32.
The tests in `tests/caffe` hold single layers to 1e-5 and whole networks to 1e-4.

"""


def compared(actual: np.ndarray, expected: np.ndarray) -> float:
    if actual.ndim == 4 and actual.shape[-1] == 7:
        return error(rows(actual), rows(expected))
    return error(actual, expected)


def fixtures() -> list[str]:
    """One row a family of fixtures; a family is what its names begin with, but for a declared batch."""
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
        "ENet's and YOLOv5s's images are made smaller; blobs before a softmax are compared too.",
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


def cost(rows: list[dict[str, Any]]) -> str:
    lines = [
        COST,
        "Measured by `make bench-converter` on two shared cores: medians of conversions in fresh processes, without",
        "the interpreter's start and imports. Memory is the most that was resident, and how much of it the conversion",
        "took; the interpreter with its packages has about 45 MB.",
        "",
        "| net | weights, MB | seconds | memory, MB | of it for the conversion | times the weights |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "seconds" in row:
            sizes = [row[key] / 1e6 for key in ("weight_bytes", "peak_bytes", "own_peak_bytes")]
            ratio = f"{sizes[2] / sizes[0]:.1f}" if sizes[0] > 10 else ""
            lines.append(
                f"| {row['net']} | {sizes[0]:.1f} | {row['seconds']:.2f} | {sizes[1]:.0f} | {sizes[2]:.0f} | {ratio} |"
            )
    lines += [
        "",
        "The same nets with the same weights, exported by PyTorch, run by turns in onnxruntime on one thread with the",
        "same options; the ratio is our time by PyTorch's, the median of pairs, good to about a hundredth. Both fold",
        "every BatchNorm. What onnxruntime makes of the graphs has as many operators for ResNet-50, and two fewer",
        "for our MobileNet v1: GlobalAveragePool keeps the layout of the convolutions, PyTorch's ReduceMean does not.",
        "",
        "| net | batch | nodes | PyTorch's nodes | ms | PyTorch's ms | ratio | outputs differ by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['net']} | {row['batch']} | {row['our_nodes']} | {row['their_nodes']} | {row['our_ms']:.1f} "
        f"| {row['their_ms']:.1f} | {row['ratio']:.3f} | {row['difference']:.1e} |"
        for row in rows
        if "ratio" in row
    ]
    return "\n".join([*lines, "", ""])


def cost_kept() -> str:
    """The section as the page has it."""
    _, _, after = OUTPUT.read_text().partition(COST)
    return COST + after.partition("\n## ")[0] + "\n" if after else ""


class Recorder:
    """A pytest plugin that keeps the largest error that each test of some modules measured, and counts its cases."""

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

    def _measured(self, actual: np.ndarray, expected: np.ndarray) -> float:
        found = error(actual, expected)
        self.worst[self._test] = max(found, self.worst.get(self._test, 0.0))
        return found


def definitions() -> list[str]:
    """One row a test of layers that the fixtures do not have."""
    recorder = Recorder()
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("published_layers", "detection_output")]
    with contextlib.redirect_stdout(sys.stderr):
        status = pytest.main(["-q", "-p", "no:cacheprovider", *files], plugins=[recorder])
    if status != pytest.ExitCode.OK:
        raise SystemExit("a layer is not as it is defined")
    lines = [
        "## Layers against their definitions",
        "",
        "What Caffe's oracle does not have is compared with its published definition in plain numpy, or with OpenCV 4",
        "where the row says so, by the tests in `test_published_layers.py` and `test_detection_output.py`.",
        "",
        "| what holds | cases | largest error |",
        "|---|---|---|",
    ]
    for test, worst in recorder.worst.items():
        lines.append(f"| {test} | {recorder.cases[test]} | {worst:.1e} |")
    return [*lines, ""]


if __name__ == "__main__":
    page = HEAD + "\n".join([*fixtures(), *definitions(), *networks(), *structures()]) + "\n"
    page += cost(json.loads(Path(sys.argv[1]).read_text())) if sys.argv[1:] else cost_kept()
    OUTPUT.write_text(page.rstrip() + "\n")
