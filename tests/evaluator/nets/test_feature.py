"""The built-in net for features, tested with a small net made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atserving.errors import InvalidArgument
from evaluator.nets import feature
from tests.caffe.nets import input_layer, layer
from tests.evaluator.built_in import Array, config, evaluate, files, loaded, start_error, with_outputs

NET = (
    input_layer(1, 3, 8, 8)
    + layer("Convolution", "data", "conv", "convolution_param { num_output: 4 kernel_size: 3 }", "conv")
    + layer("ReLU", "conv", "conv", "", "relu")
    + layer("InnerProduct", "conv", "fc", "inner_product_param { num_output: 5 }", "fc")
    + layer("Softmax", "fc", "prob")
)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return files(tmp_path_factory.mktemp("feature"), NET)


def picture(seed: int) -> Array:
    return np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)


def numbers(ret: dict[str, Any]) -> Array:
    assert (ret["code"], ret["message"]) == (0, "")
    return np.frombuffer(ret["result_file"], "<f4")


def test_default_feature_is_the_output_of_the_net(release: dict[str, Path]) -> None:
    (ret,) = evaluate(loaded("feature", config(release)), (picture(1), None))
    assert numbers(ret).shape == (5,)
    assert numbers(ret).sum() == pytest.approx(1)


def test_each_request_gets_the_layer_that_it_names(release: dict[str, Path]) -> None:
    model = loaded("feature", config(release, layers=["conv", "fc"]))
    requests = [(picture(1), {"layer": "conv"}), (picture(2), {"layer": "fc"}), (picture(1), {}), (picture(3), None)]
    conv, fc, prob, other = (numbers(ret) for ret in evaluate(model, *requests))
    assert (conv.size, fc.size, prob.size) == (4 * 6 * 6, 5, 5)
    assert conv.min() == 0  # after the ReLU, which works in place
    (alone,) = evaluate(model, (picture(2), {"layer": "prob"}))
    np.testing.assert_allclose(numbers(alone), np.exp(fc - fc.max()) / np.exp(fc - fc.max()).sum(), rtol=1e-4)
    assert not np.array_equal(prob, other)


def test_default_feature_can_be_an_inner_layer(release: dict[str, Path]) -> None:
    model = loaded("feature", config(release, layers=["fc"], output="fc"))
    (ret,) = evaluate(model, (picture(1), None))
    assert numbers(ret).sum() != pytest.approx(1)


@pytest.mark.parametrize("layer", ["data", "no such", "", None, 5, ["fc"], {"a": 1}])
def test_unknown_layer_is_refused(release: dict[str, Path], layer: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"params\.layer should be one of: prob, fc"):
        evaluate(loaded("feature", config(release, layers=["fc"])), (picture(1), {"layer": layer}))


def test_group_is_refused(release: dict[str, Path]) -> None:
    with pytest.raises(InvalidArgument, match="feature takes one image, not a list of them"):
        loaded("feature", config(release)).preprocess({"data": [{"body": b""}]})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": "fc"}, "custom_values.layers is 'fc', should be a list of texts"),
        ({"layers": [1]}, "custom_values.layers is [1], should be a list of texts"),
        ({"layers": ["no such"]}, "has no blob 'no such' to make an output of"),
        ({"output": "fc"}, "custom_values.output should name the one of features"),
    ],
)
def test_wrong_custom_values_fail_to_load(release: dict[str, Path], fields: dict[str, Any], message: str) -> None:
    assert message in start_error("feature", config(release, **fields))


def test_net_of_several_outputs_requires_a_default_feature(tmp_path: Path) -> None:
    two = files(tmp_path, NET + layer("Flatten", "conv", "flat"))
    assert "custom_values.output should name" in start_error("feature", config(two))
    (ret,) = evaluate(loaded("feature", config(two, output="flat")), (picture(1), None))
    assert numbers(ret).size == 4 * 6 * 6


def test_feature_that_is_not_finite_or_lacks_a_row_gives_code_500() -> None:
    net = with_outputs("feature", {"fc": np.array([[1.0, np.nan], [1, 2]]), "odd": np.zeros((1, 3))})
    rets = net.infer("r", [feature.Input(np.zeros((2, 2, 3), np.uint8), name) for name in ("fc", "odd")])
    assert [ret["code"] for ret in rets] == [500, 500]
