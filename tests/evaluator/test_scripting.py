"""Scripts written for pycaffe run unchanged, but only the release chooses the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atserving.errors import StartError
from evaluator import scripting
from evaluator.net_config import NetConfig
from tests.caffe.nets import input_layer, layer, write_net


@pytest.fixture(autouse=True)
def _restore_the_device() -> Iterator[None]:
    yield
    scripting.begin(NetConfig({}, use_device="CPU"))


def test_pycaffe_code_runs_a_net_unchanged(tmp_path: Path) -> None:
    caffe: Any = scripting
    paths = write_net(tmp_path, input_layer(1, 3, 4, 4) + layer("ReLU"))
    caffe.set_mode_cpu()
    net = caffe.Net(*map(str, paths), caffe.TEST)
    net.blobs["data"].reshape(2, 3, 4, 4)
    net.reshape()
    net.blobs["data"].data[...] = -1
    assert net.forward()["out"].shape == (2, 3, 4, 4)
    assert not np.any(net.blobs["out"].data)


@pytest.mark.parametrize(
    ("use_device", "call", "arguments", "message"),
    [
        ("CPU", "set_mode_gpu", (), "the script asks for a GPU, but use_device is CPU"),
        ("CPU", "set_device", (0,), "the script asks for GPU 0, but use_device is CPU"),
        ("GPU", "set_mode_cpu", (), "the script asks for the CPU, but use_device is GPU"),
        ("GPU:1", "set_device", (0,), "the script asks for GPU 0, but use_device is GPU:1"),
    ],
)
def test_script_may_not_choose_another_device(
    use_device: str, call: str, arguments: tuple[int, ...], message: str
) -> None:
    scripting.begin(NetConfig({}, use_device=use_device))
    with pytest.raises(StartError, match=message):
        getattr(scripting, call)(*arguments)


@pytest.mark.parametrize(("use_device", "index"), [("GPU", 0), ("GPU:1", 1)])
def test_script_may_name_the_device_of_its_release(use_device: str, index: int) -> None:
    scripting.begin(NetConfig({}, use_device=use_device))
    scripting.set_mode_gpu()
    scripting.set_device(index)


def test_net_of_a_gpu_release_is_never_loaded_on_the_cpu(tmp_path: Path) -> None:
    scripting.begin(NetConfig({}, use_device="GPU:63"))
    paths = write_net(tmp_path, input_layer(1, 3, 4, 4) + layer("ReLU"))
    with pytest.raises(StartError, match="use_device is GPU:63, but"):
        scripting.Net(*paths)
