"""A graph is made once, in a process that takes its memory with it."""

from __future__ import annotations

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
from evaluator.runtime.graph import Graph, made_apart


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


def test_graph_made_apart_is_the_same(tmp_path: Path) -> None:
    apart = made_apart(model, tmp_path / "net.onnx")
    assert apart.source == tmp_path / "net.onnx"
    assert apart.inputs == Graph.of(model()).inputs == {"given": [0, 3]}
    assert doubled(apart) == doubled(Graph.of(model())) == [[2, 4, 6]]


def test_graph_is_made_once(tmp_path: Path) -> None:
    def again() -> NoReturn:
        raise StartError("it is made again")

    first = made_apart(model, tmp_path / "net.onnx")
    assert made_apart(again, tmp_path / "net.onnx") == first


def test_unfinished_graph_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"cut off")
    (tmp_path / "net.part").write_text("{")
    assert doubled(made_apart(model, tmp_path / "net.onnx")) == [[2, 4, 6]]


def refused() -> NoReturn:
    raise StartError("the net can't be converted: layer 'x'")


def broken() -> NoReturn:
    raise RuntimeError("a bug")


def killed() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (refused, "the net can't be converted: layer 'x'"),
        (broken, "the process that converts the net failed, see the log"),
        (killed, "the process that converts the net was killed by signal 9"),
    ],
)
def test_failure_tells_why_and_leaves_nothing(make: Callable[[], NoReturn], reason: str, tmp_path: Path) -> None:
    with pytest.raises(StartError) as error:
        made_apart(make, tmp_path / "net.onnx")
    assert str(error.value) == reason
    assert not list(tmp_path.iterdir())
    # It can be made later.
    assert doubled(made_apart(model, tmp_path / "net.onnx")) == [[2, 4, 6]]


def test_workspace_that_takes_no_file_is_the_reason(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="can't write the converted net to the workspace: No such file or directory"):
        made_apart(model, tmp_path / "missing" / "net.onnx")


def test_worker_runs_nets_without_onnx_and_the_converter() -> None:
    """They take as much memory as all else of a small net."""
    code = "import sys, evaluator.worker.main; print(sorted({'onnx', 'evaluator.caffe'} & {*sys.modules}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
