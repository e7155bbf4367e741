"""Every fixture gives Caffe's answers, at any batch, from a clean graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from evaluator.caffe import convert

from .nets import FIXTURES, error, run, session

CASES = sorted(path.name for path in FIXTURES.iterdir())
TOLERANCE = 1e-5


def load(case: str) -> tuple[onnx.ModelProto, dict[str, dict[str, dict[str, np.ndarray]]]]:
    """The model, and arrays by batch key, in or out, and blob."""
    folder = FIXTURES / case
    arrays: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    with np.load(folder / "expected.npz") as stored:
        for key in stored.files:
            batch, kind, blob = key.split("|")
            arrays.setdefault(batch, {}).setdefault(kind, {})[blob] = stored[key]
    return convert(folder / "deploy.prototxt", folder / "weight.caffemodel"), arrays


@pytest.mark.parametrize("case", CASES)
def test_fixture_gives_the_answers_of_caffe_at_batches_of_one_and_three(case: str) -> None:
    model, arrays = load(case)
    engine = session(model)
    for batch in arrays.values():
        if "out" not in batch:
            continue
        outputs = run(engine, batch["in"])
        assert outputs.keys() == batch["out"].keys()
        for blob, expected in batch["out"].items():
            assert error(outputs[blob], expected) < TOLERANCE, blob


@pytest.mark.parametrize("case", CASES)
def test_fixture_answers_every_image_of_a_batch_as_if_it_were_alone(case: str) -> None:
    model, arrays = load(case)
    if not all(output.type.tensor_type.shape.dim[0].dim_param for output in model.graph.output):
        pytest.skip("its output is a constant without a batch axis")
    engine = session(model)
    random = np.random.default_rng(7)
    images = {blob: random.normal(0, 1, (16, *array.shape[1:])) for blob, array in arrays["b1"]["in"].items()}
    images = {blob: array.astype(np.float32) for blob, array in images.items()}
    alone = [run(engine, {blob: array[i : i + 1] for blob, array in images.items()}) for i in range(16)]
    for batch in (1, 2, 5, 16):
        together = run(engine, {blob: array[:batch] for blob, array in images.items()})
        for blob, output in together.items():
            assert error(output, np.concatenate([answer[blob] for answer in alone[:batch]])) < TOLERANCE, blob


@pytest.mark.parametrize("case", CASES)
def test_fixture_makes_a_valid_model_whose_shapes_onnx_agrees_with(case: str) -> None:
    model, _ = load(case)
    onnx.checker.check_model(model, full_check=True)
    stated = shapes(model)
    del model.graph.value_info[:]
    inferred = shapes(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True))
    for name, shape in stated.items():
        for ours, theirs in zip(shape, inferred.get(name, shape), strict=True):
            assert not (isinstance(ours, int) and isinstance(theirs, int)) or ours == theirs, name


def shapes(model: onnx.ModelProto) -> dict[str, list[int | str]]:
    return {
        value.name: [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in value.type.tensor_type.shape.dim
        ]
        for value in [*model.graph.value_info, *model.graph.output]
    }


def test_every_fixture_is_complete() -> None:
    for case in CASES:
        files = {path.name for path in Path(FIXTURES / case).iterdir()}
        assert files == {"deploy.prototxt", "weight.caffemodel", "expected.npz"}, case
