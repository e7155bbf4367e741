"""Measure the converter's accuracy and write docs/converter-accuracy.md: `python -m tests.caffe.report [BENCH.json]`.

Times and memory come from BENCH.json, which `python -m bench.converter --json` writes. Without that file, the page
keeps its section on them. Without the published networks, the page keeps its section on these too.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from bench.converter import Comparison, Conversion, comparison_table, conversion_table
from bench.measurement import markdown_table
from evaluator.caffe import convert

from .boxes import rows
from .layouts import LAYOUTS
from .nets import FIXTURES, MODELS, Array, draw_weights, error, normal, run, session, write_net
from .oracle import opencv_outputs
from .whole_nets import EXAMPLES, NETWORKS, STRUCTURES, example, layout_image, smaller

OUTPUT = Path(__file__).parents[2] / "docs" / "converter-accuracy.md"
HEAD = """# Accuracy of the converter

This page shows how far the converter's models differ from real Caffe, and what a conversion costs. `python -m
tests.caffe.report` measures the figures and writes the page. An error is the largest difference from the oracle,
relative to the largest value of the output, over all outputs of all cases. All models run in onnxruntime on a CPU in
float32. The tests in `tests/caffe` allow an error of 1e-5 for single layers and small nets, and 1e-4 for large nets.
"""
Rows = Iterable[tuple[str, str, str, str]]
COLUMNS = ("net", "nodes", "largest error", "oracle")
COST = "## Time and memory\n"
PUBLISHED = "## Published networks\n"


def compared(actual: Array, expected: Array) -> float:
    if actual.ndim == 4 and actual.shape[-1] == 7:
        return error(rows(actual), rows(expected))
    return error(actual, expected)


def fixtures() -> str:
    """Return one row per family of fixtures. The family is the first word of the name, after any "declared<B>_"."""
    errors: dict[str, list[float]] = defaultdict(list)
    cases: dict[str, int] = defaultdict(int)
    for folder in sorted(FIXTURES.iterdir()):
        words = folder.name.removeprefix("declared2_").removeprefix("declared10_").split("_")
        if words[0] == "net":
            continue
        family = "cv_" + words[1] if words[0] == "cv" else words[0]
        cases[family] += 1
        errors[family] += fixture_errors(folder)[1]
    lines = [
        (family.removeprefix("cv_"), str(cases[family]), f"{max(found):.1e}", engine(family.startswith("cv_")))
        for family, found in errors.items()
    ]
    return "## Layers\n\n" + markdown_table(("fixtures", "cases", "largest error", "oracle"), lines)


def fixture_errors(folder: Path) -> tuple[int, list[float]]:
    """Return the number of nodes, and the error of each output of each case."""
    model = convert(folder / "deploy.prototxt", folder / "weight.caffemodel")
    engine = session(model)
    errors = []
    with np.load(folder / "expected.npz") as stored:
        for batch in sorted({key.split("|")[0] for key in stored.files}):
            feeds = {key.split("|")[2]: stored[key] for key in stored.files if key.startswith(f"{batch}|in")}
            outputs = run(engine, feeds) if feeds else {}
            errors += [
                compared(outputs[blob], stored[f"{batch}|out|{blob}"])
                for blob in outputs
                if f"{batch}|out|{blob}" in stored.files
            ]
    return len(model.graph.node), errors


def engine(is_opencv: bool) -> str:
    return "OpenCV 4" if is_opencv else "BVLC Caffe"


def own_nets() -> str:
    """Return a row for each whole net of our own."""
    text = """## Whole nets

The first ten are the fixtures `net_...`: small nets with the layouts of well-known ones, and random weights. The next
five are larger, or have layers that BVLC Caffe lacks; `tests/caffe/layouts.py` makes them. The last four are the
trained nets of the examples.

"""
    return text + markdown_table(COLUMNS, [*whole_fixtures(), *layouts(), *examples()])


def whole_fixtures() -> Rows:
    for folder in sorted(FIXTURES.glob("net_*")):
        nodes, errors = fixture_errors(folder)
        yield folder.name.removeprefix("net_"), str(nodes), f"{max(errors):.1e}", engine(False)


def layouts() -> Rows:
    for name, layout in LAYOUTS.items():
        net = layout.make()
        with tempfile.TemporaryDirectory() as folder:
            nodes = len(convert(*net.write(Path(folder))).graph.node)
            ours = session(convert(*net.write(Path(folder)), outputs=layout.blobs))
            image = {"data": layout_image(net, ours.get_inputs()[0].shape[1:])}
            outputs = run(ours, image)
            expected = opencv_outputs(Path(folder), net.prototxt, net.weights, image, list(outputs))
        worst = max(compared(array, expected[blob]) for blob, array in outputs.items())
        yield name, str(nodes), f"{worst:.1e}", engine(True)


def examples() -> Rows:
    for name in EXAMPLES:
        with tempfile.TemporaryDirectory() as folder:
            paths, image = example(name, Path(folder))
            model = convert(*paths)
            theirs = cv2.dnn.readNetFromCaffe(*map(str, paths))
        theirs.setInput(image, "data")
        (output,) = run(model, {"data": image}).values()
        yield Path(name).name, str(len(model.graph.node)), f"{compared(output, theirs.forward()):.1e}", engine(True)


def published() -> str:
    """Return the section of the networks that others trained or designed, which a clone does not have."""
    if not MODELS.is_dir():
        return kept(PUBLISHED)
    text = """
Others trained or designed these networks. The repository does not contain them, so a clone keeps this section as it is.
The last four have random weights; the images of ENet and YOLOv5s are smaller than published.

"""
    return PUBLISHED + text + markdown_table(COLUMNS, [*networks(), *structures()])


def networks() -> Rows:
    for name in NETWORKS:
        folder = MODELS / name
        model = convert(folder / "deploy.prototxt", folder / "weight.caffemodel")
        ours = session(model)
        found = []
        with np.load(folder / "expected.npz") as stored:
            for case in ("img1", "rand1"):
                outputs = run(ours, {ours.get_inputs()[0].name: stored[f"{case}|in"]})
                found += [compared(array, stored[f"{case}|out|{blob}"]) for blob, array in outputs.items()]
        oracle = "OpenCV 4, without its padding rows" if name.startswith("yuface") else "BVLC Caffe"
        yield name, str(len(model.graph.node)), f"{max(found):.1e}", oracle


def structures() -> Rows:
    for name, (blobs, replacements) in STRUCTURES.items():
        prototxt = smaller((MODELS / "structures" / f"{name}.prototxt").read_text(), replacements)
        weights = draw_weights(prototxt)
        with tempfile.TemporaryDirectory() as folder:
            paths = write_net(Path(folder), prototxt, weights)
            nodes = len(convert(*paths).graph.node)
            ours = session(convert(*paths, outputs=blobs))
            image = {ours.get_inputs()[0].name: normal(1, *ours.get_inputs()[0].shape[1:])}
            outputs = run(ours, image)
            expected = opencv_outputs(Path(folder), prototxt, weights, image, list(outputs))
        worst = max(compared(array, expected[blob]) for blob, array in outputs.items())
        yield re.sub("_deploy.*", "", name), str(nodes), f"{worst:.1e}", engine(True)


def cost(figures: list[dict[str, Any]]) -> str:
    conversions = [Conversion(**row) for row in figures if "seconds" in row]
    comparisons = [Comparison(**row) for row in figures if "ratio" in row]
    text = """
`make bench-converter` measures these figures; see [benchmarks.md](benchmarks.md). They are medians over conversions in
fresh processes, without the start of the interpreter and its imports. Memory is the peak of resident memory; the
interpreter with its packages accounts for about 45 MB of it. The times depend on the machine and on its load, so
compare the rows of this page only.

"""
    ratios = """

The next table compares our models with PyTorch's exports of the same nets with the same weights. Both run in turns in
onnxruntime, on one thread with the same options. The ratio is our time divided by PyTorch's, the median over pairs of
runs. Both exports fold every BatchNorm. After onnxruntime's optimizations, the graphs of ResNet-50 have equally many
operators. Our MobileNet v1 has two fewer: GlobalAveragePool keeps the memory layout of the convolutions, PyTorch's
ReduceMean does not.

"""
    return COST + text + conversion_table(conversions) + ratios + comparison_table(comparisons)


def kept(section: str) -> str:
    """Return a section of the current page."""
    _, _, after = OUTPUT.read_text().partition(section)
    return section + after.partition("\n## ")[0].rstrip() if after else ""


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


def definitions() -> str:
    """Return one row per test of the layers without a fixture."""
    recorder = Recorder()
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("published_layers", "detection_output")]
    with contextlib.redirect_stdout(sys.stderr):
        status = pytest.main(["-q", "-p", "no:cacheprovider", *files], plugins=[recorder])
    if status != pytest.ExitCode.OK:
        raise SystemExit("a layer differs from its definition")
    text = """## Layers against their definitions

The Caffe oracle does not support these layers. `test_published_layers.py` and `test_detection_output.py` compare them
with their published definitions in plain NumPy, or with OpenCV 4 if the test's name says so.

"""
    lines = [(test, str(recorder.cases[test]), f"{worst:.1e}") for test, worst in recorder.worst.items()]
    return text + markdown_table(("test", "cases", "largest error"), lines)


def main(arguments: list[str]) -> None:
    measured = json.loads(Path(arguments[0]).read_text()) if arguments else None
    sections: list[Callable[[], str]] = [fixtures, definitions, own_nets, published]
    page = [HEAD.rstrip(), *(section() for section in sections), cost(measured) if measured else kept(COST)]
    OUTPUT.write_text("\n\n".join(part for part in page if part) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
