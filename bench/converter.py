"""The converter: how long a conversion takes and how much memory, and how fast its nets are beside PyTorch's.

    python -m bench.converter [--runs 30] [--json FILE]

A conversion runs in a process of its own; time and memory are the conversion's, without the interpreter's start and
its imports. PyTorch exports the same nets with the same weights, if it is installed, with onnxscript; both models run
in onnxruntime with the same options, by turns. Compare ratios of one run, never times of different machines.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from evaluator.caffe import convert
from tests.caffe.nets import MODELS, draw_weights, error, write_net

# With the layer before the softmax.
NETS = {"mobilenet_v1": "fc7", "resnet-50": "fc1000"}
BATCHES = (1, 8)
_FRESH = """
import sys, time
from evaluator.caffe import convert
def peak(): return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before, start = peak(), time.perf_counter()
convert(*sys.argv[1:])
print(time.perf_counter() - start, peak(), before)
"""


@dataclass(frozen=True)
class Conversion:
    """Medians over fresh processes. Memory is the most that was resident, with the interpreter and without."""

    net: str
    weight_bytes: int
    seconds: float
    peak_bytes: int
    own_peak_bytes: int


@dataclass(frozen=True)
class Comparison:
    """One net as converted and as PyTorch exports it; `ratio` is our time by theirs, the median of pairs."""

    net: str
    batch: int
    our_nodes: int
    their_nodes: int
    our_ms: float
    their_ms: float
    ratio: float
    difference: float


def conversion(name: str, paths: Sequence[Path], runs: int) -> Conversion:
    said = [
        subprocess.run(
            [sys.executable, "-c", _FRESH, *paths], check=True, capture_output=True, text=True
        ).stdout.split()
        for _ in range(runs)
    ]
    seconds, peak, own = (
        statistics.median(numbers)
        for numbers in zip(*((float(s), int(p), int(p) - int(b)) for s, p, b in said), strict=True)
    )
    return Conversion(name, paths[1].stat().st_size, seconds, int(peak), int(own))


def session(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def timed(engine: onnxruntime.InferenceSession, image: np.ndarray) -> tuple[float, np.ndarray]:
    name = engine.get_inputs()[0].name
    start = time.perf_counter()
    (output,) = engine.run(None, {name: image})
    return (time.perf_counter() - start) * 1000, output


def comparisons(name: str, ours: onnx.ModelProto, theirs: onnx.ModelProto, runs: int) -> list[Comparison]:
    engines = [session(model.SerializeToString()) for model in (ours, theirs)]
    found = []
    for batch in BATCHES:
        image = np.random.default_rng(1).normal(0, 1, (batch, 3, 224, 224)).astype(np.float32)
        outputs = [timed(engine, image)[1] for engine in engines]
        pairs = []
        for i in range(runs):
            # Each goes first as often as the other, so that neither has the warmer cache.
            order = (0, 1) if i % 2 == 0 else (1, 0)
            times = {which: timed(engines[which], image)[0] for which in order}
            pairs.append((times[0], times[1]))
        found.append(
            Comparison(
                name,
                batch,
                len(ours.graph.node),
                len(theirs.graph.node),
                statistics.median(pair[0] for pair in pairs),
                statistics.median(pair[1] for pair in pairs),
                statistics.median(pair[0] / pair[1] for pair in pairs),
                error(outputs[0].reshape(batch, -1), outputs[1].reshape(batch, -1)),
            )
        )
    return found


def softened(prototxt: str, last: str) -> dict[str, list[np.ndarray]]:
    """Drawn weights, those before the softmax made small: one that is 0 and 1 shows no difference between nets."""
    weights = draw_weights(prototxt)
    with tempfile.TemporaryDirectory() as folder:
        engine = session(convert(*write_net(Path(folder), prototxt, weights), outputs=[last]).SerializeToString())
    image = np.random.default_rng(0).normal(0, 1, (1, 3, 224, 224)).astype(np.float32)
    (scores,) = engine.run([last], {engine.get_inputs()[0].name: image})
    weights[last][0] = weights[last][0] / np.abs(scores).max()
    return weights


def show(row: Conversion | Comparison) -> str:
    if isinstance(row, Conversion):
        return (
            f"{row.net}: {row.weight_bytes / 1e6:.1f} MB of weights in {row.seconds:.2f} s; memory "
            f"{row.peak_bytes / 1e6:.0f} MB, {row.own_peak_bytes / 1e6:.0f} MB of it for the conversion"
        )
    return (
        f"{row.net}, batch {row.batch}: {row.our_nodes} nodes, PyTorch's {row.their_nodes}; {row.our_ms:.1f} ms, "
        f"PyTorch's {row.their_ms:.1f} ms; ratio {row.ratio:.3f}; outputs differ by {row.difference:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=30, help="pairs of runs a net and batch (default 30)")
    parser.add_argument("--json", type=Path, help="write the results there too")
    arguments = parser.parse_args()
    structures = MODELS / "structures"
    if not structures.is_dir():
        sys.exit(f"the nets to convert are not there: {structures}")
    rows: list[Conversion | Comparison] = []
    has_torch = importlib.util.find_spec("torch") and importlib.util.find_spec("onnxscript")
    for path in sorted(structures.parent.glob("*/weight.caffemodel")):
        rows.append(conversion(path.parent.name, (path.with_name("deploy.prototxt"), path), 3))
        print(show(rows[-1]), flush=True)
    for path in sorted(path for path in structures.glob("*.prototxt") if path.stem not in NETS):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(conversion(path.stem, write_net(Path(folder), path.read_text()), 3))
        print(show(rows[-1]), flush=True)
    for name, last in NETS.items():
        prototxt = (structures / f"{name}.prototxt").read_text()
        weights = softened(prototxt, last)
        with tempfile.TemporaryDirectory() as folder:
            paths = write_net(Path(folder), prototxt, weights)
            found: list[Conversion | Comparison] = [conversion(name, paths, 5)]
            if has_torch:
                from bench.torch_nets import export

                export(name, weights, Path(folder) / "torch.onnx")
                found += comparisons(name, convert(*paths), onnx.load(Path(folder) / "torch.onnx"), arguments.runs)
        for row in found:
            print(show(row), flush=True)
        rows += found
    if not has_torch:
        print("PyTorch with onnxscript is not installed: nothing to compare the nets' speed with")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()
