"""Every fixture gives Caffe's results, at any batch size, from a valid graph."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from . import cases
from .nets import FIXTURES, error, run

TOLERANCE = 1e-5


@pytest.mark.parametrize("name", cases.NAMES)
def test_fixture_matches_caffe(name: str) -> None:
    for batch in cases.batches(name).values():
        if not batch.outputs:
            continue
        outputs = run(cases.engine(name), batch.inputs)
        assert outputs.keys() == batch.outputs.keys()
        for blob, expected in batch.outputs.items():
            assert error(outputs[blob], expected) < TOLERANCE, blob


@pytest.mark.parametrize("name", cases.NAMES)
def test_fixture_gives_each_image_of_a_batch_the_same_result_as_alone(name: str) -> None:
    if not all(output.type.tensor_type.shape.dim[0].dim_param for output in cases.model(name).graph.output):
        pytest.skip("its output is a constant without a batch axis")
    engine = cases.engine(name)
    random = np.random.default_rng(7)
    images = {
        blob: random.normal(0, 1, (16, *array.shape[1:])).astype(np.float32)
        for blob, array in cases.batches(name)["b1"].inputs.items()
    }
    alone = [run(engine, {blob: array[i : i + 1] for blob, array in images.items()}) for i in range(16)]
    for batch in (1, 2, 5, 16):
        together = run(engine, {blob: array[:batch] for blob, array in images.items()})
        for blob, output in together.items():
            assert error(output, np.concatenate([outputs[blob] for outputs in alone[:batch]])) < TOLERANCE, blob


@pytest.mark.parametrize("name", cases.NAMES)
def test_fixture_gives_a_valid_model_with_correct_shapes(name: str) -> None:
    model = cases.model(name)
    onnx.checker.check_model(model, full_check=True)
    declared = shapes(model)
    without_shapes = onnx.ModelProto()
    without_shapes.CopyFrom(model)
    del without_shapes.graph.value_info[:]
    inferred = shapes(onnx.shape_inference.infer_shapes(without_shapes, strict_mode=True, data_prop=True))
    for value, shape in declared.items():
        for ours, theirs in zip(shape, inferred.get(value, shape), strict=True):
            assert not (isinstance(ours, int) and isinstance(theirs, int)) or ours == theirs, value


def shapes(model: onnx.ModelProto) -> dict[str, list[int | str]]:
    return {
        value.name: [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in value.type.tensor_type.shape.dim
        ]
        for value in [*model.graph.value_info, *model.graph.output]
    }


def test_every_fixture_has_all_files() -> None:
    for name in cases.NAMES:
        files = {path.name for path in (FIXTURES / name).iterdir()}
        assert files == {"deploy.prototxt", "weight.caffemodel", "expected.npz"}, name
