"""The built-in classifier, tested with the digits release and with small nets made here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atserving.errors import StartError
from evaluator import nets
from evaluator.fetching.unpack import unpack
from evaluator.net_contract import Ret
from evaluator.nets.classify import Classify
from evaluator.runtime.net import Net
from tests.caffe.nets import input_layer, layer
from tests.evaluator.built_in import config, evaluate, loaded, start_error, with_outputs
from tests.evaluator.built_in import files as files_of
from tests.evaluator.digits import DIGITS


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return unpack(DIGITS / "digits-v1.tar", tmp_path_factory.mktemp("digits"))


def rets(scores: Any, *limits: int, labels: str = "") -> list[Ret]:
    """Return the rets of a classifier whose net gives these scores, one request per limit."""
    image = np.zeros((2, 2, 3), np.uint8)
    return evaluate(with_outputs("classify", {"out": scores}, labels), *((image, {"limit": limit}) for limit in limits))


def test_each_request_of_a_batch_gets_its_own_result(files: Mapping[str, Path]) -> None:
    net = loaded("classify", config(files))
    reqs = [
        net.preprocess({"data": {"body": (DIGITS / "images" / f"{digit}.png").read_bytes()}}) for digit in range(10)
    ]
    results = net.infer("r", reqs)
    assert [ret["result"]["confidences"][0]["index"] for ret in results] == list(range(10))


def test_each_request_has_its_own_limit_and_equal_scores_are_ordered_by_index() -> None:
    two, three = rets([[0.1, 0.4, 0.4, 0.1], [0.7, 0.1, 0.1, 0.1]], 2, 3)
    assert [each["index"] for each in two["result"]["confidences"]] == [1, 2]
    assert [each["index"] for each in three["result"]["confidences"]] == [0, 1, 2]


def test_output_of_a_global_pooling_gives_scores() -> None:
    assert rets(np.array([0.2, 0.8]).reshape(1, 2, 1, 1), 1)[0]["result"]["confidences"][0]["index"] == 1


def test_class_without_a_label_is_named_by_its_index() -> None:
    confidences = rets([[0.1, 0.9]], 2, labels="0,cat")[0]["result"]["confidences"]
    assert [each["class"] for each in confidences] == ["1", "cat"]


@pytest.mark.parametrize("scores", [[[0.1, np.nan]], [[np.inf, 0]], np.zeros((1, 2, 3)), np.zeros((2, 2))])
def test_output_that_is_not_finite_or_misshapen_gives_code_500(scores: Any) -> None:
    assert [ret["code"] for ret in rets(scores, 1)] == [500]


@pytest.mark.parametrize(
    ("more", "shape"),
    [("", "(3, 4, 4)"), (layer("Reduction", "data", "out", "reduction_param { axis: 1 }"), "()")],
    ids=["map", "number"],
)
def test_net_without_one_score_per_class_does_not_load(tmp_path: Path, more: str, shape: str) -> None:
    net = files_of(tmp_path, input_layer(1, 3, 4, 4) + (more or layer("Sigmoid")))
    assert start_error("classify", config(net)) == f"classify takes nets that give one score a class; 'out' is {shape}"


def test_batch_size_comes_from_the_release_or_else_from_the_device(files: Mapping[str, Path]) -> None:
    assert loaded("classify", config(files, batch_size=3)).batch_size == 3
    assert loaded("classify", config(files)).batch_size == 8


def test_built_in_net_is_found_by_its_name() -> None:
    assert nets.built_in("classify") is Classify
    with pytest.raises(StartError, match="the built-in nets are: "):
        nets.built_in("no such")


def test_net_has_the_interface_of_pycaffe(files: Mapping[str, Path]) -> None:
    net = Net(files["deploy.prototxt"], files["weight.caffemodel"], 1)
    assert (net.inputs, net.outputs) == (["data"], ["prob"])
    assert net.blobs["data"].shape == (1, 3, 28, 28)
    net.blobs["data"].reshape(2, 3, 28, 28)
    net.blobs["data"].data[...] = 100
    of_blobs = net.forward()["prob"]
    assert of_blobs.shape == net.blobs["prob"].shape == (2, 10)
    of_arguments = net.forward(data=np.full((5, 3, 28, 28), 100.0))["prob"]
    np.testing.assert_allclose(of_arguments, np.repeat(of_blobs[:1], 5, axis=0), rtol=1e-5)
    with pytest.raises(KeyError):
        net.forward(image=np.zeros((1, 3, 28, 28)))
