"""A release that asks for a GPU gets one, or does not start."""

from typing import Any

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from atserving.errors import StartError
from evaluator.engine import Engine


def model() -> onnx.ModelProto:
    shape: list[str | int | None] = ["n", 3]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["data"], ["prob"])],
        "net",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("prob", TensorProto.FLOAT, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


def test_inputs_and_outputs_are_known_without_their_batch() -> None:
    engine = Engine(model(), intra_op_threads=1)
    assert [(blob.name, blob.shape) for blob in (*engine.inputs, *engine.outputs)] == [("data", (3,)), ("prob", (3,))]


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="has CUDA")
def test_an_onnxruntime_without_cuda_does_not_fall_back() -> None:
    with pytest.raises(StartError, match="use_device is GPU:1, but this onnxruntime has no CUDA"):
        Engine(model(), "GPU:1")


def test_a_session_that_silently_got_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    session = onnxruntime.InferenceSession
    asked: list[Any] = []

    def without_cuda(graph: bytes, options: Any, providers: list[Any]) -> Any:
        # As onnxruntime does where CUDA's libraries can't be loaded: a warning, and the next provider.
        asked.extend(providers)
        return session(graph, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", without_cuda)
    with pytest.raises(StartError, match="use_device is GPU:2, but onnxruntime can't use CUDA here"):
        Engine(model(), "GPU:2")
    assert asked[0] == ("CUDAExecutionProvider", {"device_id": 2})


def test_a_graph_that_can_not_be_loaded_is_one_line() -> None:
    broken = model()
    broken.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(StartError, match="onnxruntime can't load the net on CPU") as error:
        Engine(broken)
    assert "\n" not in str(error.value)
