"""`use_device` and `model_params` give the device's options; the defaults apply to missing ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atserving.errors import StartError
from evaluator.net_config import NetConfig
from evaluator.options import Options
from evaluator.runtime.device import Device


def release(use_device: str = "GPU", batch_size: int | None = None, **model_params: Any) -> NetConfig:
    params = Options("model_params", model_params)
    return NetConfig({}, model_params=params, batch_size=batch_size, use_device=use_device)


def test_missing_options_have_the_defaults_of_the_device() -> None:
    assert Device.of_release(release("CPU")) == Device()
    assert Device.of_release(release("GPU")) == Device("GPU", batch_size=32)


def test_options_of_the_release_reach_the_device() -> None:
    options: dict[str, Any] = {
        "intra_op_threads": 3,
        "spinning": True,
        "arena": False,
        "tensorrt": True,
        "fp16": True,
        "tf32": False,
        "gpu_mem_limit_mib": 512,
        "cudnn_conv_algo_search": "EXHAUSTIVE",
    }
    device = Device.of_release(replace(release("GPU:2", 5, **options), workspace=Path("/somewhere")))
    assert device == Device("GPU:2", batch_size=5, cache=Path("/somewhere/tensorrt"), **options)
    assert (device.index, device.is_cpu) == (2, False)


def test_unknown_model_params_are_ignored() -> None:
    assert Device.of_release(release("CPU", script_timeout_s=3, of_a_script="x")) == Device()


@pytest.mark.parametrize(
    ("key", "value", "should_be"),
    [
        ("intra_op_threads", 0, "a positive integer"),
        ("spinning", "yes", "true or false"),
        ("arena", 1, "true or false"),
        ("tensorrt", None, "true or false"),
        ("fp16", "true", "true or false"),
        ("tf32", 0, "true or false"),
        ("gpu_mem_limit_mib", 1.5, "a positive integer"),
        ("cudnn_conv_algo_search", "exhaustive", "DEFAULT, HEURISTIC or EXHAUSTIVE"),
        ("cudnn_conv_algo_search", 1, "a text"),
    ],
)
def test_wrong_option_fails_to_load(key: str, value: Any, should_be: str) -> None:
    with pytest.raises(StartError) as error:
        Device.of_release(release("GPU", **{key: value}))
    assert str(error.value) == f"model_params.{key} is {value!r}, should be {should_be}"


@pytest.mark.parametrize("key", ["tensorrt", "fp16"])
def test_option_of_a_gpu_fails_to_load_on_the_cpu(key: str) -> None:
    with pytest.raises(StartError, match=f"model_params.{key} is true, but use_device is CPU"):
        Device.of_release(release("CPU", **{key: True}))
    assert Device.of_release(release("CPU", **{key: False})) == Device()
