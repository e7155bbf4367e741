"""A worker with a bound on its memory fails the one request that takes too much, and goes on."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from atserving.errors import ServingError, StartError, Unavailable
from evaluator.net_config import NetConfig
from evaluator.options import Options
from evaluator.runtime import memory, memory_limit
from tests.evaluator.scripts import BlockingSupervisor, started

ROOT = Path(__file__).parents[3]
NONE = Path("/nonexistent")
SCRIPT = """
import os
import numpy as np

def net_init(cfg):
    return {"pid": os.getpid(), "batch_size": 4}

def net_preprocess(model, req):
    np.ones(req.get("params", {}).get("prepare_mib", 0) << 20, np.uint8)
    return req

def net_inference(model, args):
    params = [req.get("params", {}) for req in args["reqs"]]
    held = [np.ones(each.get("infer_mib", 0) << 20, np.uint8) for each in params]
    return [{"code": 0, "result": {"pid": model["pid"]}} for _ in params]
"""
MESSAGE = "the instance has too little memory left for this request"


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockingSupervisor]:
    """Run a worker that may take 256 MiB, with all that it loads."""
    with started(tmp_path_factory.mktemp("bounded").resolve(), SCRIPT, model_params={"memory_mib": 256}) as worker:
        yield worker


@pytest.mark.parametrize("stage", ["prepare_mib", "infer_mib"])
def test_request_that_takes_too_much_memory_fails(bounded: BlockingSupervisor, stage: str) -> None:
    pid = bounded.pid()
    for _ in range(3):
        error = bounded.ask(**{stage: 400})
        assert isinstance(error, Unavailable), error
        assert (error.status, error.message, error.refused) == (503, MESSAGE, False)
    assert not isinstance(bounded.ask(**{stage: 20}), ServingError)
    assert bounded.pid() == pid


def test_others_of_a_batch_run_again_alone(bounded: BlockingSupervisor) -> None:
    pid = bounded.pid()
    large, *others = bounded.ask_in_one_batch({"infer_mib": 400}, {}, {"infer_mib": 1}, {})
    assert isinstance(large, Unavailable)
    assert not any(isinstance(each, ServingError) for each in others)
    assert bounded.pid() == pid


LIMITED = """
import resource, sys
import cv2, numpy as np, onnx, onnxruntime
from onnx import helper, TensorProto
from atserving.v1.evaluator_pb2 import InferRequest
from atserving.v1.serving_pb2 import Resource
from evaluator.images import decode
from evaluator.limits import Limits
from evaluator.runtime import memory_limit
from evaluator.worker import request_codec
from tests.evaluator.worker.large_images import IMAGES

def shortage(work):
    try:
        work()
    except BaseException as error:
        return memory_limit.is_shortage(error) or repr(error)
    return "it passed"

images = {name: make() for name, make in IMAGES.items()}
tensors = [helper.make_tensor_value_info(*each) for each in (("x", 1, [1]), ("s", 7, [1]), ("y", 1, ["n"]))]
graph = helper.make_graph([helper.make_node("Expand", ["x", "s"], ["y"])], "g", tensors[:2], tensors[2:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
sessions = []
for arena in (True, False):
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = arena
    sessions.append(onnxruntime.InferenceSession(model.SerializeToString(), options))
resources = [Resource(), Resource(body=bytes(100 << 20))]
request = InferRequest(data=resources, group=True).SerializeToString()
memory_limit.bound(1)
feeds = {"x": np.ones(1, np.float32), "s": np.array([1 << 27])}
assert shortage(lambda: request_codec.read(request, Limits(), None)) is True
assert "InvalidArgument" in shortage(lambda: request_codec.read(bytes(9), Limits(), None))
assert shortage(lambda: cv2.resize(np.zeros((9, 9, 3), np.uint8), (9999, 9999))) is True
assert [shortage(lambda: each.run(None, feeds)) for each in sessions] == [True, True]
filler = []
try:
    while True:
        filler.append(np.ones(8 << 20, np.uint8))
except MemoryError:
    pass
found = {name: shortage(lambda: decode(data, Limits())) for name, data in images.items()}
assert set(found.values()) == {True}, found
assert "InvalidArgument" in shortage(lambda: decode(b"GIF89a", Limits()))
"""


def test_shortages_of_all_libraries_are_told_from_other_errors() -> None:
    run = subprocess.run([sys.executable, "-c", LIMITED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_pods_limit_bounds_the_memory_unless_the_release_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "limit_bytes", lambda: 1000.0)
    assert memory_limit.chosen_bytes(NetConfig({}), 300) == 700
    assert memory_limit.chosen_bytes(NetConfig({}), 900) == 500
    chosen = Options("model_params", {"memory_mib": 5})
    assert memory_limit.chosen_bytes(NetConfig({}, model_params=chosen, use_device="GPU"), 300) == 5 << 20
    # CUDA maps far more than it takes.
    assert memory_limit.chosen_bytes(NetConfig({}, use_device="GPU"), 300) == math.inf
    with pytest.raises(StartError, match=r"model_params\.memory_mib"):
        memory_limit.chosen_bytes(NetConfig({}, model_params=Options("model_params", {"memory_mib": "5"})), 0)


def test_wrong_bound_stops_the_start(tmp_path: Path) -> None:
    with (
        pytest.raises(StartError, match=r"model_params\.memory_mib is 0, should be a positive integer"),
        started(tmp_path, SCRIPT, model_params={"memory_mib": 0}),
    ):
        pass


def test_only_a_cgroup_below_the_machine_is_a_limit(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16 kB\n")
    (tmp_path / "memory.max").write_text("9223372036854771712\n")
    assert memory.limit_bytes(tmp_path, NONE, meminfo) == math.inf
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory.limit_bytes(tmp_path, NONE, meminfo) == 5000
    assert memory.limit_bytes(NONE, NONE, meminfo) == math.inf
