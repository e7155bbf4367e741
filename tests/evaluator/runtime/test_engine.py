"""An engine is one session of onnxruntime, here on the CPU. test_gpu.py tests the others."""

import onnx
import pytest
from onnx import TensorProto, helper

from atserving.errors import StartError
from evaluator.runtime.device import Device
from evaluator.runtime.engine import Engine


def model() -> onnx.ModelProto:
    shape: list[str | int | None] = ["n", 3]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["data"], ["prob"])],
        "net",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("prob", TensorProto.FLOAT, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


def test_engine_gives_names_and_shapes_without_the_batch() -> None:
    engine = Engine(model(), Device(intra_op_threads=1))
    assert [(blob.name, blob.shape) for blob in (*engine.inputs, *engine.outputs)] == [("data", (3,)), ("prob", (3,))]


def test_broken_graph_gives_an_error_of_one_line() -> None:
    broken = model()
    broken.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(StartError, match="onnxruntime can't load the net on CPU") as error:
        Engine(broken)
    assert "\n" not in str(error.value)
