"""Compare a converted net with Caffe and OpenCV, if they are installed, on random input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from . import prototxt
from .caffemodel import read_bytes
from .errors import ConversionError
from .net_plan import NetPlan, plan_net
from .oracles import OracleRequest, OracleResult, run_caffe, run_opencv
from .prototxt import parse_net

Float32 = NDArray[np.float32]

TOLERANCE = 1e-4
SEED = 0

# Some nets contain their declared batch size as a literal, and Caffe can run them at that size only. Larger declared
# batches run as one image to save time.
_MAX_BATCH = 16
_REGIONS = 8


@dataclass(frozen=True)
class Comparison:
    """The comparison of one output with one oracle.

    Attributes:
        difference: the largest difference, relative to the oracle's largest value; None if they cannot be compared.
        reason: why they cannot be compared, or "".
    """

    output: str
    difference: float | None
    reason: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the difference is within `TOLERANCE`."""
        return self.difference is not None and self.difference <= TOLERANCE


@dataclass(frozen=True)
class Verdict:
    """The result of one oracle: a comparison per output, or the `reason` why it could not run the net."""

    oracle: str
    comparisons: tuple[Comparison, ...]
    reason: str = ""

    @property
    def agrees(self) -> bool:
        """Whether all outputs agree; true for an oracle without comparisons."""
        return all(comparison.agrees for comparison in self.comparisons)


@dataclass(frozen=True)
class Verification:
    """The result of running a net in onnxruntime and in the oracles.

    Attributes:
        inputs: the shapes of the inputs, by name.
        outputs: the shapes of the outputs, by name.
    """

    inputs: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, tuple[int, ...]]
    verdicts: tuple[Verdict, ...]

    @property
    def agrees(self) -> bool:
        """Whether no oracle disagrees."""
        return all(verdict.agrees for verdict in self.verdicts)


def verify(model: onnx.ModelProto, prototxt_path: Path, caffemodel_path: Path, caffe_python: str = "") -> Verification:
    """Run `model`, which `convert` made from the two files, and run the oracles on the same input.

    Args:
        caffe_python: an interpreter that can import caffe; "" for the running one.

    Raises:
        ConversionError: onnxruntime cannot run the model, or the files cannot be read.
        ModuleNotFoundError: onnxruntime is not installed.
    """
    text = read_bytes(prototxt_path, prototxt.MAX_BYTES)
    plan = plan_net(parse_net(text, prototxt_path.name), prototxt_path.name)
    feeds = random_inputs(model, plan)
    outputs = _run(model, feeds)
    request = OracleRequest(prototxt_path, caffemodel_path, plan, feeds, tuple(outputs))
    return Verification(
        {name: array.shape for name, array in feeds.items()},
        {name: array.shape for name, array in outputs.items()},
        tuple(_judge(result, outputs) for result in (run_caffe(request, caffe_python), run_opencv(request))),
    )


def random_inputs(model: onnx.ModelProto, plan: NetPlan) -> dict[str, Float32]:
    """Draw an array for each input from a fixed seed: boxes within the image for regions, else normal numbers."""
    random = np.random.default_rng(SEED)
    feeds: dict[str, Float32] = {}
    for info, (_, declared) in zip(model.graph.input, plan.inputs, strict=True):
        if info.type.tensor_type.shape.dim[0].dim_param == "R":
            feeds[info.name] = _regions(random, plan.inputs[0][1])
        elif len(declared) == 2 and declared[1] == 3 and info.name == "im_info":
            # Faster R-CNN's input of this name is (height, width, scale) of the image.
            feeds[info.name] = np.array([[*plan.inputs[0][1][-2:], 1]], np.float32)
        else:
            batch = declared[0] if declared[0] <= _MAX_BATCH else 1
            feeds[info.name] = random.normal(0, 1, (batch, *declared[1:])).astype(np.float32)
    return feeds


def _regions(random: np.random.Generator, image: tuple[int, ...]) -> Float32:
    height, width = image[-2:]
    corners = np.sort(random.uniform(0, 1, (_REGIONS, 2, 2)), axis=1) * [width - 1, height - 1]
    return np.hstack([np.zeros((_REGIONS, 1)), corners.reshape(_REGIONS, 4)]).astype(np.float32)


def _run(model: onnx.ModelProto, feeds: Mapping[str, Float32]) -> dict[str, Float32]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))
    # onnxruntime's exceptions have no common base class.
    except Exception as error:
        raise ConversionError(f"onnxruntime cannot run the model: {error}") from error


def _judge(result: OracleResult, outputs: Mapping[str, Float32]) -> Verdict:
    if result.reason:
        return Verdict(result.oracle, (), result.reason)
    return Verdict(
        result.oracle, tuple(_compare(name, array, result.outputs.get(name)) for name, array in outputs.items())
    )


def _compare(name: str, actual: Float32, expected: Float32 | None) -> Comparison:
    if expected is None:
        return Comparison(name, None, "the oracle has no such output")
    if actual.ndim == 4 and actual.shape[3] == 7 and expected.shape[3:] == (7,):
        actual, expected = _detections(actual), _detections(expected)
    if actual.shape != expected.shape:
        return Comparison(name, None, f"its shape is {list(actual.shape)}, the oracle's is {list(expected.shape)}")
    return _difference(name, actual, expected)


def _difference(name: str, actual: Float32, expected: Float32) -> Comparison:
    if not np.array_equal(np.isfinite(actual), np.isfinite(expected)):
        return Comparison(name, None, "one is NaN or infinite where the other is finite")
    finite = np.isfinite(expected)
    if not finite.any():
        return Comparison(name, 0.0)
    largest = float(np.abs(actual[finite].astype(np.float64) - expected[finite]).max())
    return Comparison(name, largest / max(float(np.abs(expected[finite]).max()), 1e-30))


def _detections(table: NDArray[Any]) -> Float32:
    """Sort detections and drop OpenCV's rows of padding, because engines list detections in different orders."""
    rows = table.reshape(-1, 7)
    rows = rows[rows[:, 2] > 0]
    return rows[np.lexsort((-rows[:, 2], rows[:, 1], rows[:, 0]))]
