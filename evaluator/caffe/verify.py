"""Compares a converted net with Caffe and with OpenCV, where they are, on random input."""

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
from .oracles import Answer, Question, ask_caffe, ask_opencv
from .prototxt import parse_net

Float32 = NDArray[np.float32]

TOLERANCE = 1e-4
SEED = 0

# A net that was written for a batch may hold it in a literal, which Caffe needs to be given then; more than this many
# images would only take long.
_MAX_BATCH = 16
_REGIONS = 8


@dataclass(frozen=True)
class Comparison:
    """One output against one oracle.

    Attributes:
        difference: the largest, relative to the largest value of the oracle's; None where they cannot be compared.
        reason: why they cannot.
    """

    output: str
    difference: float | None
    reason: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the output is the oracle's, to `TOLERANCE`."""
        return self.difference is not None and self.difference <= TOLERANCE


@dataclass(frozen=True)
class Judgement:
    """What one oracle says: a comparison for each output, or the `reason` why it says nothing."""

    oracle: str
    comparisons: tuple[Comparison, ...]
    reason: str = ""

    @property
    def agrees(self) -> bool:
        """Whether nothing disagrees; an oracle that says nothing does not."""
        return all(comparison.agrees for comparison in self.comparisons)


@dataclass(frozen=True)
class Verification:
    """A net that ran in onnxruntime.

    Attributes:
        shapes: what it was fed, by input.
        outputs: the shapes of what it gave, by output.
    """

    shapes: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, tuple[int, ...]]
    judgements: tuple[Judgement, ...]

    @property
    def agrees(self) -> bool:
        """Whether no oracle disagrees."""
        return all(judgement.agrees for judgement in self.judgements)


def verify(model: onnx.ModelProto, prototxt_path: Path, caffemodel_path: Path, caffe_python: str = "") -> Verification:
    """Runs `model`, which `convert` made of the two files, and asks the oracles about the same input.

    Args:
        caffe_python: an interpreter that can import caffe, if this one cannot.

    Raises:
        ConversionError: onnxruntime cannot run the model, or the files cannot be read.
        ModuleNotFoundError: onnxruntime is not installed.
    """
    text = read_bytes(prototxt_path, prototxt.MAX_BYTES)
    plan = plan_net(parse_net(text, prototxt_path.name), prototxt_path.name)
    feeds = random_inputs(model, plan)
    outputs = _run(model, feeds)
    question = Question(prototxt_path, caffemodel_path, plan, feeds, tuple(outputs))
    return Verification(
        {name: array.shape for name, array in feeds.items()},
        {name: array.shape for name, array in outputs.items()},
        tuple(_judge(answer, outputs) for answer in (ask_caffe(question, caffe_python), ask_opencv(question))),
    )


def random_inputs(model: onnx.ModelProto, plan: NetPlan) -> dict[str, Float32]:
    """Normal numbers from a seed for each input, and boxes within the image for regions."""
    random = np.random.default_rng(SEED)
    feeds: dict[str, Float32] = {}
    for info, (_, declared) in zip(model.graph.input, plan.inputs, strict=True):
        if info.type.tensor_type.shape.dim[0].dim_param == "R":
            feeds[info.name] = _regions(random, plan.inputs[0][1])
        elif len(declared) == 2 and declared[1] == 3 and info.name == "im_info":
            # Faster R-CNN's: height, width and scale of the image.
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
    # onnxruntime's errors have no ancestor of their own.
    except Exception as error:
        raise ConversionError(f"onnxruntime cannot run the model: {error}") from error


def _judge(answer: Answer, outputs: Mapping[str, Float32]) -> Judgement:
    if answer.reason:
        return Judgement(answer.oracle, (), answer.reason)
    return Judgement(
        answer.oracle, tuple(_compare(name, array, answer.outputs.get(name)) for name, array in outputs.items())
    )


def _compare(name: str, actual: Float32, expected: Float32 | None) -> Comparison:
    if expected is None:
        return Comparison(name, None, "the oracle does not have it")
    if actual.ndim == 4 and actual.shape[3] == 7 and expected.shape[3:] == (7,):
        actual, expected = _detections(actual), _detections(expected)
    if actual.shape != expected.shape:
        return Comparison(name, None, f"it has the shape {list(actual.shape)}, and the oracle's {list(expected.shape)}")
    return _difference(name, actual, expected)


def _difference(name: str, actual: Float32, expected: Float32) -> Comparison:
    if not np.array_equal(np.isfinite(actual), np.isfinite(expected)):
        return Comparison(name, None, "one has numbers where the other has none (NaN or infinite)")
    finite = np.isfinite(expected)
    if not finite.any():
        return Comparison(name, 0.0)
    largest = float(np.abs(actual[finite].astype(np.float64) - expected[finite]).max())
    return Comparison(name, largest / max(float(np.abs(expected[finite]).max()), 1e-30))


def _detections(table: NDArray[Any]) -> Float32:
    """Detections in an order of their own, without OpenCV's padding: engines list them differently."""
    rows = table.reshape(-1, 7)
    rows = rows[rows[:, 2] > 0]
    return rows[np.lexsort((-rows[:, 2], rows[:, 1], rows[:, 0]))]
