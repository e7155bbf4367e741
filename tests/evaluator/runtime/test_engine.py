"""An engine is one session of onnxruntime, here on the CPU. test_gpu.py tests the others."""

import math
import subprocess
import sys

import onnx
import pytest
from onnx import TensorProto, helper

from atserving.errors import StartError
from atserving.local.examples import ROOT
from evaluator.runtime.device import Device
from evaluator.runtime.engine import Engine
from evaluator.runtime.graph import Graph


def model() -> onnx.ModelProto:
    shape: list[str | int | None] = ["n", 3]
    nodes = [helper.make_node("Sigmoid", ["data"], ["inner"]), helper.make_node("Exp", ["inner"], ["prob"])]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("prob", TensorProto.FLOAT, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


def test_engine_gives_names_and_shapes_without_the_batch() -> None:
    engine = Engine(Graph.of(model()), Device(intra_op_threads=1))
    assert [(blob.name, blob.shape) for blob in (*engine.inputs, *engine.outputs)] == [("data", (3,)), ("prob", (3,))]


def test_broken_graph_gives_an_error_of_one_line() -> None:
    broken = model()
    broken.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(StartError, match="onnxruntime can't load the net on CPU") as error:
        Engine(Graph.of(broken))
    assert "\n" not in str(error.value)


MEASURE = """
import os, sys
from pathlib import Path
import numpy as np
from evaluator.runtime.device import Device
from evaluator.runtime.engine import Engine
from evaluator.runtime.graph import Graph
from tests.evaluator.runtime.test_engine import model

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

engine = Engine(Graph.of(model()), Device(intra_op_threads=1, arena=sys.argv[1] == "True"))
# onnxruntime keeps what it allocated first.
engine.run(["prob"], {"data": np.ones((1, 3), np.float32)})
before_mb = resident_mb()
engine.run(["prob"], {"data": np.ones((8_000_000, 3), np.float32)})
held_mb = resident_mb() - before_mb
engine.shrink()
print(held_mb, resident_mb() - before_mb, engine.run(["prob"], {"data": np.zeros((2, 3), np.float32)})[0].mean())
"""


@pytest.mark.parametrize("arena", [True, False])
def test_a_shrunk_engine_gives_back_the_memory_of_large_batches(arena: bool) -> None:
    """In a process of its own, whose memory nothing else uses."""
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(arena)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    held_mb, left_mb, result = map(float, measured.stdout.split())
    # Without an arena there was nothing to give back.
    assert (held_mb > 60) == arena
    assert left_mb < 30
    assert result == pytest.approx(math.exp(0.5))
