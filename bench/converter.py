"""Measure the converter: the time and memory of a conversion, and the speed of its nets beside PyTorch's.

    python -m bench.converter [--runs 30] [--json FILE]

The nets are those of the examples, and MobileNet v1 and ResNet-50 with random weights. A conversion runs in a process
of its own; time and memory are the conversion's, without the interpreter's start and its imports. If PyTorch and
onnxscript are installed, PyTorch exports the same nets with the same weights; both models run in onnxruntime with the
same options, by turns. Compare ratios of one run, never times of different machines.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from atserving.local.examples import FOLDER, ROOT
from bench.measurement import markdown_table
from bench.nets import CaffeNet, mobilenet_v1, resnet_50
from evaluator.caffe import convert

EXAMPLES = (
    "digits/digits-v1.tar",
    "digits/digits-v2.tar",
    "detect/digits-detect-v1.tar",
    "segment/digits-segment-v1.tar",
)
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
    """Medians over fresh processes. Memory is the peak resident size, with the interpreter and without."""

    net: str
    weight_bytes: int
    seconds: float
    peak_bytes: int
    own_peak_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.net}: {self.weight_bytes / 1e6:.1f} MB of weights in {self.seconds:.2f} s; memory "
            f"{self.peak_bytes / 1e6:.0f} MB, {self.own_peak_bytes / 1e6:.0f} MB of it for the conversion"
        )


@dataclass(frozen=True)
class Comparison:
    """One net, converted and exported by PyTorch; ``ratio`` is our time by theirs, the median of pairs."""

    net: str
    batch: int
    our_nodes: int
    their_nodes: int
    our_ms: float
    their_ms: float
    ratio: float
    difference: float

    def __str__(self) -> str:
        return (
            f"{self.net}, batch {self.batch}: {self.our_nodes} nodes, PyTorch's {self.their_nodes}; "
            f"{self.our_ms:.1f} ms, PyTorch's {self.their_ms:.1f} ms; ratio {self.ratio:.3f}; "
            f"outputs differ by {self.difference:.1e}"
        )


def conversion(name: str, paths: Sequence[Path], runs: int) -> Conversion:
    """Convert a net in ``runs`` processes, one after the other."""
    printed = [
        subprocess.run(
            [sys.executable, "-c", _FRESH, *paths], check=True, capture_output=True, text=True, cwd=ROOT
        ).stdout.split()
        for _ in range(runs)
    ]
    seconds, peak, own = (
        statistics.median(numbers)
        for numbers in zip(*((float(s), int(p), int(p) - int(b)) for s, p, b in printed), strict=True)
    )
    return Conversion(name, paths[1].stat().st_size, seconds, int(peak), int(own))


def comparisons(net: str, ours: onnx.ModelProto, theirs: onnx.ModelProto, runs: int) -> list[Comparison]:
    """Run both models by turns, at each batch size."""
    sessions = [_session(model) for model in (ours, theirs)]
    found = []
    for batch in BATCHES:
        # On the scale of pixels less their mean.
        image = np.random.default_rng(1).normal(0, 60, (batch, 3, 224, 224)).astype(np.float32)
        outputs = [_timed(session, image)[1].reshape(batch, -1) for session in sessions]
        pairs = []
        for i in range(runs):
            # Each goes first as often as the other, so that neither has the warmer cache.
            order = (0, 1) if i % 2 == 0 else (1, 0)
            times = {which: _timed(sessions[which], image)[0] for which in order}
            pairs.append((times[0], times[1]))
        found.append(
            Comparison(
                net,
                batch,
                len(ours.graph.node),
                len(theirs.graph.node),
                statistics.median(pair[0] for pair in pairs),
                statistics.median(pair[1] for pair in pairs),
                statistics.median(pair[0] / pair[1] for pair in pairs),
                float(np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[1]).max()),
            )
        )
    return found


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _timed(session: onnxruntime.InferenceSession, image: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the milliseconds of one run, and its output."""
    name = session.get_inputs()[0].name
    start = time.perf_counter()
    (output,) = session.run(None, {name: image})
    return (time.perf_counter() - start) * 1000, output


def measure_example(tar: Path) -> Conversion:
    """Measure the conversion of an example's net."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(tar) as archive:
        archive.extractall(folder, filter="data")
        return conversion(tar.stem, [Path(folder, "deploy.prototxt"), Path(folder, "weight.caffemodel")], 3)


def measure_made(net: CaffeNet, runs: int, *, with_torch: bool) -> tuple[Conversion, list[Comparison]]:
    """Measure the conversion of a net made in code, and compare it with PyTorch's export."""
    with tempfile.TemporaryDirectory() as folder:
        paths = net.write(Path(folder))
        its_conversion = conversion(net.name, paths, 5)
        if not with_torch:
            return its_conversion, []
        from bench.torch_nets import export

        exported = Path(folder) / "torch.onnx"
        export(net, exported)
        return its_conversion, comparisons(net.name, convert(*paths), onnx.load(exported), runs)


def conversion_table(rows: Sequence[Conversion]) -> str:
    header = ("net", "weights, MB", "seconds", "peak memory, MB", "conversion's share, MB", "share / weights")
    lines = []
    for row in rows:
        weights, peak, own = (size / 1e6 for size in (row.weight_bytes, row.peak_bytes, row.own_peak_bytes))
        ratio = f"{own / weights:.1f}" if weights > 10 else ""
        lines.append((row.net, f"{weights:.1f}", f"{row.seconds:.2f}", f"{peak:.0f}", f"{own:.0f}", ratio))
    return markdown_table(header, lines)


def comparison_table(rows: Sequence[Comparison]) -> str:
    header = ("net", "batch", "nodes", "PyTorch's nodes", "ms", "PyTorch's ms", "ratio", "outputs differ by")
    lines = [
        (
            *(row.net, str(row.batch), str(row.our_nodes), str(row.their_nodes)),
            *(f"{row.our_ms:.1f}", f"{row.their_ms:.1f}", f"{row.ratio:.3f}", f"{row.difference:.1e}"),
        )
        for row in rows
    ]
    return markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=30, help="pairs of runs per net and batch (default: 30)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    arguments = parser.parse_args()
    has_torch = all(importlib.util.find_spec(name) for name in ("torch", "onnxscript"))
    conversions: list[Conversion] = []
    compared: list[Comparison] = []
    for tar in EXAMPLES:
        conversions.append(measure_example(FOLDER / tar))
        print(conversions[-1], flush=True)
    for make in (mobilenet_v1, resnet_50):
        its_conversion, its_comparisons = measure_made(make(), arguments.runs, with_torch=has_torch)
        print(*(its_conversion, *its_comparisons), sep="\n", flush=True)
        conversions.append(its_conversion)
        compared += its_comparisons
    print(f"\n{conversion_table(conversions)}\n")
    if has_torch:
        print(comparison_table(compared))
    else:
        print("For the comparison with PyTorch, install it with onnxscript: pip install torch onnxscript")
    if arguments.json:
        rows = [asdict(row) for row in conversions] + [asdict(row) for row in compared]
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
