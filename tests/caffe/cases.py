"""The fixtures, each converted once per test session: a net with the inputs and outputs of real Caffe."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime

from evaluator.caffe import convert

from .nets import FIXTURES, Array, session

NAMES = sorted(path.name for path in FIXTURES.iterdir())


@dataclass(frozen=True)
class Batch:
    """Input and output arrays by blob. `outputs` is empty if Caffe did not run this batch."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


@functools.cache
def model(name: str) -> onnx.ModelProto:
    """Return the converted fixture. Do not modify it: all tests share it."""
    return convert(FIXTURES / name / "deploy.prototxt", FIXTURES / name / "weight.caffemodel")


@functools.cache
def engine(name: str) -> onnxruntime.InferenceSession:
    """Return a session of the converted fixture. All tests share it."""
    return session(model(name))


def batches(name: str) -> dict[str, Batch]:
    """Return the stored batches of a fixture by their key, such as "b1" and "b3"."""
    arrays: dict[str, dict[str, dict[str, Array]]] = {}
    with np.load(FIXTURES / name / "expected.npz") as stored:
        for key in stored.files:
            batch, kind, blob = key.split("|")
            arrays.setdefault(batch, {"in": {}, "out": {}})[kind][blob] = stored[key]
    return {batch: Batch(kinds["in"], kinds["out"]) for batch, kinds in arrays.items()}
