"""A graph is made once, in a process that takes its memory with it."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from atserving.errors import StartError
from evaluator.runtime.engine import Engine
from evaluator.runtime.graph import Graph
from evaluator.runtime.graph import made_apart as made_apart


def model() -> onnx.ModelProto:
    """Return a graph that doubles (n, 3) float32."""
    sizes: list[str | int | None] = ["n", 3]
    given = helper.make_tensor_value_info("given", TensorProto.FLOAT, sizes)
    doubled = helper.make_tensor_value_info("doubled", TensorProto.FLOAT, sizes)
    graph = helper.make_graph([helper.make_node("Add", ["given", "given"], ["doubled"])], "net", [given], [doubled])
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])


def doubled(graph: Graph) -> object:
    (result,) = Engine(graph).run(["doubled"], {"given": np.array([[1, 2, 3]], np.float32)})
    return result.tolist()


def refused() -> NoReturn:
    raise StartError("the net can't be converted: layer 'x'")


def refused_at_length() -> NoReturn:
    # A message is cut, perhaps within a character.
    raise StartError("x" + "é" * 6000)


def broken() -> NoReturn:
    raise RuntimeError("a bug")


def killed() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def apart(make: Callable[[], onnx.ModelProto], file: Path) -> Graph | str:
    """Make a graph in a process of its own, as the tests' has threads; return its error if it fails."""
    code = (
        "import sys; from pathlib import Path; from tests.evaluator.runtime import test_graph as tests\n"
        f"try: print(dict(tests.made_apart(tests.{make.__name__}, Path(sys.argv[1])).inputs))\n"
        "except tests.StartError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True, timeout=60)
    said = ran.stdout.splitlines()[-1]
    return Graph(file, ast.literal_eval(said)) if said.startswith("{") else said


def made(make: Callable[[], onnx.ModelProto], file: Path) -> Graph:
    graph = apart(make, file)
    assert isinstance(graph, Graph), graph
    return graph


def test_graph_made_apart_is_the_same(tmp_path: Path) -> None:
    graph = made(model, tmp_path / "net.onnx")
    assert graph.inputs == Graph.of(model()).inputs == {"given": [0, 3]}
    assert doubled(graph) == doubled(Graph.of(model())) == [[2, 4, 6]]


def test_graph_is_made_once(tmp_path: Path) -> None:
    first = made(model, tmp_path / "net.onnx")
    assert made(broken, tmp_path / "net.onnx") == first


def test_unfinished_graph_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"cut off")
    (tmp_path / "net.part").write_text("{")
    assert doubled(made(model, tmp_path / "net.onnx")) == [[2, 4, 6]]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (refused, "the net can't be converted: layer 'x'"),
        (refused_at_length, "x" + "é" * 4095 + "\ufffd"),
        (broken, "the process that converts the net failed, see the log"),
        (killed, "the process that converts the net was killed by signal 9"),
    ],
)
def test_failure_tells_why_and_leaves_nothing(make: Callable[[], NoReturn], reason: str, tmp_path: Path) -> None:
    assert apart(make, tmp_path / "net.onnx") == reason
    assert not list(tmp_path.iterdir())
    # It can be made later.
    assert doubled(made(model, tmp_path / "net.onnx")) == [[2, 4, 6]]


def test_workspace_that_takes_no_file_is_the_reason(tmp_path: Path) -> None:
    reason = "can't write the converted net to the workspace: No such file or directory"
    assert apart(model, tmp_path / "missing" / "net.onnx") == reason


def test_worker_runs_nets_without_onnx_and_the_converter() -> None:
    """They take as much memory as all else of a small net."""
    code = "import sys, evaluator.worker.main; print(sorted({'onnx', 'evaluator.caffe'} & {*sys.modules}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
