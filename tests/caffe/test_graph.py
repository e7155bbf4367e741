"""The converted graph has no needless nodes or weights, and the conversion is pure."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest

from bench.nets import resnet_50
from evaluator.caffe import convert, summarize
from evaluator.caffe.layers import CONVERTERS

from . import cases
from .nets import FIXTURES, draw_weights, error, input_layer, layer, normal, run, write_net

CONV = "convolution_param { num_output: 4 kernel_size: 3 }"
SCALE = "scale_param { bias_term: true }"


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bn_scale_inplace", ["Conv", "Relu"]),
        ("conv_bn_scale_nobias", ["Conv"]),
        ("deconv_group2_bn", ["ConvTranspose"]),
        ("ip_bn_scale", ["Reshape", "Gemm"]),
        ("ip_transpose_bn", ["Reshape", "Gemm"]),
        ("conv_power", ["Conv"]),
        ("bn_scale", ["BatchNormalization"]),
        ("bn_only", ["BatchNormalization"]),
        ("scale_nobias", ["Mul"]),
        ("bias_layer", ["Add"]),
        ("pool_whole", ["GlobalAveragePool"]),
        ("crop_nothing", ["Relu"]),
        ("concat_one", ["Relu"]),
        ("dropout_named", ["Tanh"]),
        ("silence", ["Tanh", "Split"]),
        ("reshape_literal_two_steps", ["Reshape"]),
        ("cv_priorbox", ["Identity"]),
        ("pool_max_floor_pad", ["MaxPool"]),
        ("ip_2d_in", ["Gemm"]),
        ("pool_grid_9", ["AveragePool"]),
        ("pool_ave_ceil", ["AveragePool"]),
        ("pool_ave_pad1_k3s2", ["AveragePool", "Mul"]),
        ("permute", ["Transpose"]),
    ],
)
def test_graph_has_no_needless_nodes(name: str, expected: list[str]) -> None:
    assert operators(cases.model(name)) == expected


def test_batch_norm_is_not_folded_into_a_convolution_with_other_readers(tmp_path: Path) -> None:
    prototxt = (
        input_layer(1, 3, 6, 6)
        + layer("Convolution", tops="c", more=CONV)
        + layer("BatchNorm", "c", "b")
        + layer("Scale", "b", "s", SCALE)
        + layer("Eltwise", "c s")
    )
    assert operators(convert(*write_net(tmp_path, prototxt))) == ["Conv", "BatchNormalization", "Add"]


def test_extra_output_prevents_folding_and_has_its_own_value(tmp_path: Path) -> None:
    prototxt = (
        input_layer(1, 3, 6, 6)
        + layer("Convolution", tops="c", more=CONV)
        + layer("BatchNorm", "c", "b")
        + layer("Dropout", "b", "d")
        + layer("ReLU", "d", "out")
    )
    weights = draw_weights(prototxt)
    paths = write_net(tmp_path, prototxt, weights)
    plain, extra = convert(*paths), convert(*paths, outputs=["c", "d", "b", "out"])
    assert [output.name for output in extra.graph.output] == ["out", "c", "d", "b"]
    data = {"data": normal(2, 3, 6, 6)}
    outputs = run(extra, data)
    assert error(outputs["out"], run(plain, data)["out"]) < 1e-5
    mean, variance, factor = weights["the_BatchNorm"]
    expected = (outputs["c"] - (mean / factor)[:, None, None]) / np.sqrt((variance / factor) + 1e-5)[:, None, None]
    assert error(outputs["b"], expected) < 1e-5
    assert error(outputs["d"], outputs["b"]) == 0


def test_inverse_permutes_are_removed(tmp_path: Path) -> None:
    order = "permute_param { order: 0 order: 2 order: 3 order: 1 }"
    back = "permute_param { order: 0 order: 3 order: 1 order: 2 }"
    prototxt = (
        input_layer(1, 3, 4, 5)
        + layer("ReLU", tops="r")
        + layer("Permute", "r", "p", order, name="there")
        + layer("Permute", "p", "q", back, name="back")
        + layer("TanH", "q")
    )
    assert operators(convert(*write_net(tmp_path, prototxt, {}))) == ["Relu", "Tanh"]


def test_batch_can_be_on_another_axis_inside_the_net(tmp_path: Path) -> None:
    order = "permute_param { order: 1 order: 0 }"
    prototxt = input_layer(1, 3, 4) + layer("Permute", tops="p", more=order) + layer("ReLU", "p", "r")
    prototxt += layer("Permute", "r", "out", order, name="back")
    data = normal(5, 3, 4)
    assert error(run(convert(*write_net(tmp_path, prototxt, {})), {"data": data})["out"], data.clip(0)) == 0


@pytest.mark.parametrize(
    "layers",
    [
        # In order: a read before the overwrite, a Dropout (which writes nothing), and layers that copy.
        layer("Split", tops="a b") + layer("TanH", "b", "c") + layer("ReLU", "a", "a") + layer("Eltwise", "a c"),
        layer("Split", tops="a b") + layer("Dropout", "a", "a") + layer("Eltwise", "a b"),
        layer("Split", tops="a b") + layer("TanH", "a", "c") + layer("ReLU", "c", "c") + layer("Eltwise", "c b"),
        layer("Flatten", tops="f") + layer("ReLU", "f", "f") + layer("TanH", "f"),
    ],
)
def test_shared_memory_is_allowed_if_no_later_read_is_overwritten(layers: str, tmp_path: Path) -> None:
    assert convert(*write_net(tmp_path, input_layer(1, 3, 4, 5) + layers, {}))


def test_permute_of_single_element_axes_becomes_a_reshape(tmp_path: Path) -> None:
    order = "permute_param { order: 0 order: 2 order: 3 order: 1 }"
    prototxt = input_layer(1, 6, 1, 1) + layer("ReLU", tops="r") + layer("Permute", "r", more=order)
    model = convert(*write_net(tmp_path, prototxt, {}))
    assert operators(model) == ["Relu", "Reshape"]
    data = normal(3, 6, 1, 1)
    assert error(run(model, {"data": data})["out"], data.clip(0).transpose(0, 2, 3, 1)) == 0


def test_equal_weights_are_stored_once(tmp_path: Path) -> None:
    prototxt = (
        input_layer(1, 4, 6, 6)
        + layer("Convolution", tops="a", more=CONV, name="one")
        + layer("Convolution", tops="b", more=CONV, name="two")
        + layer("Eltwise", "a b")
    )
    weights = [normal(4, 4, 3, 3), normal(4)]
    model = convert(*write_net(tmp_path, prototxt, {"one": weights, "two": weights}))
    assert len(model.graph.initializer) == 2
    assert model.graph.node[0].input[1:] == model.graph.node[1].input[1:]


def test_initializers_are_distinct_and_used() -> None:
    for case in cases.NAMES:
        model = cases.model(case)
        stored = Counter((t.data_type, tuple(t.dims), t.raw_data) for t in model.graph.initializer)
        assert max(stored.values(), default=1) == 1, case
        read = {name for node in model.graph.node for name in node.input}
        assert {tensor.name for tensor in model.graph.initializer} <= read, case


def test_nodes_are_named_after_their_layers() -> None:
    for case in cases.NAMES:
        layers = {line.split('name: "')[1].split('"')[0] for line in _layer_lines(FIXTURES / case)}
        names = [node.name for node in cases.model(case).graph.node]
        assert len(set(names)) == len(names), case
        for name in names:
            assert any(name == one or name.startswith(f"{one}/") for one in layers), (case, name)


def _layer_lines(folder: Path) -> list[str]:
    text = (folder / "deploy.prototxt").read_text().replace("\n", " ")
    return [part for part in text.replace("layers {", "layer {").split("layer {") if 'name: "' in part]


def test_last_in_place_layer_over_an_input_names_the_output(tmp_path: Path) -> None:
    prototxt = input_layer(1, 3, 4, 5) + layer("ReLU", "data", "data") + layer("TanH", "data", "data", name="t")
    model = convert(*write_net(tmp_path, prototxt, {}))
    assert [value.name for value in model.graph.input] == ["data"]
    assert [value.name for value in model.graph.output] == ["data/t"]


def test_model_metadata_names_its_source(tmp_path: Path) -> None:
    prototxt, weights = write_net(tmp_path, 'name: "tiny"\n' + input_layer(1, 3, 4, 5) + layer("ReLU"), {})
    model = convert(prototxt, weights)
    assert (model.ir_version, model.opset_import[0].version) == (10, 22)
    assert (model.graph.name, model.producer_name) == ("tiny", "atserving-caffe")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["producer"] == f"{model.producer_name} {model.producer_version}"
    assert metadata["caffe.layers"] == "1"
    assert metadata["caffe.prototxt.sha256"] == hashlib.sha256(prototxt.read_bytes()).hexdigest()
    assert metadata["caffe.caffemodel.sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_conversion_has_no_side_effects(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_net(tmp_path / "net", input_layer(1, 3, 6, 6) + layer("Convolution", more=CONV))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))

    def state() -> tuple[object, ...]:
        files = {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")}
        return files, dict(os.environ), np.geterr(), str(np.random.get_state()), random.getstate(), os.getcwd()

    monkeypatch.chdir(tmp_path / "elsewhere")
    before = state()
    first = convert(*paths)
    assert state() == before
    monkeypatch.chdir(tmp_path / "net")
    before = state()
    second = convert(paths[0].name, paths[1].name)
    assert state() == before
    assert first.SerializeToString() == second.SerializeToString()
    assert capfd.readouterr() == ("", "")


def test_another_process_makes_the_same_bytes() -> None:
    script = (
        "import sys; from evaluator.caffe import convert\n"
        "sys.stdout.buffer.write(convert(*sys.argv[1:]).SerializeToString())"
    )
    case = FIXTURES / "v1_many"
    done = subprocess.run(
        [sys.executable, "-c", script, case / "deploy.prototxt", case / "weight.caffemodel"],
        check=True,
        capture_output=True,
        cwd=Path(__file__).parents[2],
        # Another order of sets and dictionaries than in this process.
        env={**os.environ, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"},
    )
    assert done.stdout == cases.model("v1_many").SerializeToString()


def test_concurrent_conversions_are_independent() -> None:
    names = ["conv_basic", "v1_many", "ip_bn_scale", "slice_even3"] * 4

    def converted(name: str) -> bytes:
        return convert(FIXTURES / name / "deploy.prototxt", FIXTURES / name / "weight.caffemodel").SerializeToString()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(converted, names)) == [cases.model(name).SerializeToString() for name in names]


def test_resnet_is_reduced_to_its_convolutions(tmp_path: Path) -> None:
    model = convert(*resnet_50().write(tmp_path))
    # PyTorch's export of its ResNet-50 has the same nodes, but a Flatten for the Reshape, and no Softmax.
    assert Counter(operators(model)) == {
        "Conv": 53,
        "Relu": 49,
        "Add": 16,
        "MaxPool": 1,
        "GlobalAveragePool": 1,
        "Reshape": 1,
        "Gemm": 1,
        "Softmax": 1,
    }
    summary = summarize(model)
    # 25,503,912 weights and 26,560 biases.
    assert summary.parameters == 25_530_472
    assert 3.8e9 < summary.multiply_adds < 3.9e9
    assert (summary.inputs, summary.outputs) == ({"data": ("N", 3, 224, 224)}, {"prob": ("N", 1000)})


def test_summary_counts_parameters_and_multiply_adds(tmp_path: Path) -> None:
    prototxt = (
        input_layer(1, 3, 8, 8)
        + layer("Convolution", tops="c", more="convolution_param { num_output: 4 kernel_size: 3 }")
        + layer("Deconvolution", "c", "d", "convolution_param { num_output: 2 kernel_size: 2 stride: 2 }")
        + layer("InnerProduct", "d", "out", "inner_product_param { num_output: 5 }")
    )
    model = convert(*write_net(tmp_path, prototxt))
    summary = summarize(model)
    assert summary.inputs == {"data": ("N", 3, 8, 8)}
    assert summary.outputs == {"out": ("N", 5)}
    assert summary.parameters == (3 * 4 * 9 + 4) + (4 * 2 * 4 + 2) + (2 * 144 * 5 + 5)
    assert summary.multiply_adds == 36 * 3 * 4 * 9 + 36 * 4 * 2 * 4 + 2 * 144 * 5
    assert [one.name for one in summary.layers][:2] == ["the_Convolution", "the_Deconvolution"]
    assert (summary.opset, summary.size) == (22, model.ByteSize())


def test_every_layer_type_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "layers.md").read_text()
    table = {cell.strip().split(" (")[0] for line in page.splitlines() for cell in line.split("|")[1:2]}
    documented = {kind for cell in table for kind in cell.split(", ")}
    assert set(CONVERTERS) <= documented
    assert documented - set(CONVERTERS) <= {"Input", "Caffe type", "---"}
