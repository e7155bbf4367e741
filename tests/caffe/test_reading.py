"""The converter reads every form of prototxt and caffemodel."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evaluator.caffe import ConversionError, convert

from .nets import Array, answer, delimited, error, input_layer, layer, normal, run, varint, write_net

NET = input_layer(1, 3, 4, 5) + layer("InnerProduct", more="inner_product_param { num_output: 2 }")
WEIGHT, BIAS = normal(2, 60, seed=1), normal(2, seed=2)
DATA = normal(3, 3, 4, 5)
EXPECTED = DATA.reshape(3, 60) @ WEIGHT.T + BIAS


def shape_field(array: Array) -> bytes:
    return delimited(7, delimited(1, b"".join(varint(dim) for dim in array.shape)))


def packed(array: Array) -> bytes:
    return shape_field(array) + delimited(5, array.astype("<f4").tobytes())


def unpacked(array: Array) -> bytes:
    return b"".join(b"\x2d" + number.astype("<f4").tobytes() for number in array.reshape(-1)) + shape_field(array)


def unpacked_dims(array: Array) -> bytes:
    dims = b"".join(b"\x08" + varint(dim) for dim in array.shape)
    return delimited(7, dims) + delimited(5, array.astype("<f4").tobytes())


def double(array: Array) -> bytes:
    return shape_field(array) + delimited(8, array.astype("<f8").tobytes())


def unpacked_double(array: Array) -> bytes:
    return shape_field(array) + b"".join(b"\x41" + number.astype("<f8").tobytes() for number in array.reshape(-1))


def in_pieces(array: Array) -> bytes:
    flat = array.reshape(-1).astype("<f4")
    one = b"\x2d" + flat[:1].tobytes()
    return shape_field(array) + one + delimited(5, flat[1:-1].tobytes()) + b"\x2d" + flat[-1:].tobytes()


def legacy(array: Array) -> bytes:
    dims = (1,) * (4 - array.ndim) + array.shape
    fields = b"".join(varint(i + 1 << 3) + varint(dim) for i, dim in enumerate(dims))
    return fields + delimited(5, array.astype("<f4").tobytes())


def with_other_fields(array: Array) -> bytes:
    """Serialize the data with gradients and a fork's unknown field before it."""
    return delimited(6, array.tobytes()) + delimited(99, b"?") + packed(array)


FORMS = (packed, unpacked, unpacked_dims, double, unpacked_double, in_pieces, legacy, with_other_fields)


@pytest.mark.parametrize("version", ["new", "V1"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_of_blob_is_read(form: Callable[[Array], bytes], version: str, tmp_path: Path) -> None:
    net, name, blobs = (100, 1, 7) if version == "new" else (2, 4, 6)
    body = delimited(name, b"the_InnerProduct") + b"".join(delimited(blobs, form(array)) for array in (WEIGHT, BIAS))
    paths = write_net(tmp_path, NET, {})
    paths[1].write_bytes(delimited(1, b"a net") + delimited(net, delimited(name, b"other")) + delimited(net, body))
    assert error(run(convert(*paths), {"data": DATA})["out"], EXPECTED) < 1e-5


def test_caffemodel_supplies_only_weights(tmp_path: Path) -> None:
    trained = delimited(100, delimited(1, b"data") + delimited(2, b"Data"))
    trained += delimited(
        100,
        delimited(1, b"the_InnerProduct")
        + delimited(2, b"Mystery")
        + delimited(3, b"other")
        + delimited(7, packed(WEIGHT))
        + delimited(7, packed(BIAS)),
    )
    paths = write_net(tmp_path, NET, {})
    paths[1].write_bytes(trained)
    assert error(run(convert(*paths), {"data": DATA})["out"], EXPECTED) < 1e-5


def test_unknown_fields_are_skipped(tmp_path: Path) -> None:
    prototxt = NET.replace(
        "inner_product_param {", 'mystery_param { a: 1 b { c: "x" } } inner_product_param { new: [1, 2] '
    )
    prototxt = "engine: FAST\n" + prototxt + "# a comment in another encoding: \xe9\n"
    paths = write_net(tmp_path, prototxt, {"the_InnerProduct": [WEIGHT, BIAS]})
    paths[0].write_bytes(b"\xef\xbb\xbf" + prototxt.encode("latin-1"))
    assert error(run(convert(*paths), {"data": DATA})["out"], EXPECTED) < 1e-5


def test_every_style_of_prototxt_is_read(tmp_path: Path) -> None:
    styles = {
        "CRLF": NET.replace("\n", "\r\n").replace("layer {", "layer {\r\n"),
        "old Mac": NET.replace("\n", " "),
        "single quotes": NET.replace('"', "'"),
        "brackets": NET.replace("{", "<").replace("}", ">"),
        "separators": NET.replace(" type:", ", type:").replace(" top:", "; top:"),
        "colons": NET.replace("param {", "param: {"),
        "comments": NET.replace("\n", " # what {\n#\n"),
        "tabs": NET.replace(" ", "\t"),
        "list of dims": NET.replace("dim: 1 dim: 3 dim: 4 dim: 5", "dim: [1, 3, 4, 5]"),
        "hexadecimal": NET.replace("num_output: 2", "num_output: 0x2"),
        "strings in pieces": NET.replace('"the_InnerProduct"', "\"the_\" 'InnerProduct'"),
        "no last newline": NET.strip(),
    }
    for name, prototxt in styles.items():
        paths = write_net(tmp_path, NET, {"the_InnerProduct": [WEIGHT, BIAS]})
        paths[0].write_bytes(prototxt.encode())
        assert error(run(convert(*paths), {"data": DATA})["out"], EXPECTED) < 1e-5, name


def test_paths_can_be_strings_or_path_likes(tmp_path: Path) -> None:
    class PathLike:
        def __init__(self, path: Path) -> None:
            self._path = path

        def __fspath__(self) -> str:
            return str(self._path)

    paths = write_net(tmp_path, NET, {"the_InnerProduct": [WEIGHT, BIAS]})
    kinds: tuple[Callable[[Path], str | os.PathLike[str]], ...] = (Path, str, PathLike)
    models = [convert(kind(paths[0]), kind(paths[1])) for kind in kinds]
    assert models[0] == models[1] == models[2]


@pytest.mark.parametrize("name", ["a/b/c", "conv 1", "été-卷积", "a:0", "x" * 300, "data", "out"])
def test_layers_and_blobs_can_have_any_names(name: str, tmp_path: Path) -> None:
    blob = f"{name}/blob"
    prototxt = input_layer(1, 3, 4, 5)
    prototxt += layer("InnerProduct", tops="@", more="inner_product_param { num_output: 2 }", name=name)
    prototxt = prototxt.replace('"@"', f'"{blob}"')
    # Rename the Input layer, because one of the names is its own.
    prototxt = prototxt.replace('name: "data" type: "Input"', 'name: "the input" type: "Input"')
    model = convert(*write_net(tmp_path, prototxt, {name: [WEIGHT, BIAS]}))
    assert error(run(model, {"data": DATA})[blob], EXPECTED) < 1e-5
    assert model.graph.node[0].name == name


def test_deep_net_of_old_layers_is_read(tmp_path: Path) -> None:
    depth = 152
    prototxt = 'name: "deep"\ninput: "0" input_dim: 1 input_dim: 2 input_dim: 5 input_dim: 5\n'
    weights = {}
    expected = data = normal(2, 2, 5, 5)
    for i in range(depth):
        prototxt += f'layers {{ name: "conv{i}" type: CONVOLUTION bottom: "{i}" top: "{i + 1}" '
        prototxt += "convolution_param { num_output: 2 kernel_size: 1 } }\n"
        prototxt += f'layers {{ name: "relu{i}" type: RELU bottom: "{i + 1}" top: "{i + 1}" }}\n'
        weight = np.array([[0.8, 0.3], [0.4, 0.7]]) if i % 2 else np.array([[0.2, 0.9], [0.8, 0.1]])
        weights[f"conv{i}"] = [weight.reshape(2, 2, 1, 1), np.full(2, 0.01)]
        expected = np.maximum(np.einsum("oc,nchw->nohw", weight, expected) + 0.01, 0)
    model = convert(*write_net(tmp_path, prototxt, weights))
    assert len(model.graph.node) == 2 * depth
    assert error(run(model, {"0": data})[str(depth)], expected.astype(np.float32)) < 1e-4


def test_dynamic_size_keeps_height_and_width_symbolic(tmp_path: Path) -> None:
    conv = "convolution_param { num_output: 4 kernel_size: 3 pad: 1 stride: 2 }"
    up = "convolution_param { num_output: 4 group: 4 kernel_size: 4 stride: 2 pad: 1 bias_term: false }"
    prototxt = (
        input_layer(1, 3, 12, 12)
        + layer("Convolution", tops="c", more=conv)
        + layer("Pooling", "c", "p", "pooling_param { kernel_size: 3 stride: 2 }")
        + layer("Deconvolution", "p", "d", up)
        + layer("Crop", "d c", "e", "crop_param { offset: 0 }")
        + layer("Eltwise", "e c", "s")
        + layer("Pooling", "s", "g", "pooling_param { pool: AVE global_pooling: true }", name="global")
        + layer("Softmax", "s", "map")
    )
    paths = write_net(tmp_path, prototxt)
    fixed, free = convert(*paths), convert(*paths, dynamic_size=True)
    dims = free.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["N", 3, "H", "W"]
    data = normal(2, 3, 12, 12)
    for name, array in run(fixed, {"data": data}).items():
        assert error(run(free, {"data": data})[name], array) < 1e-6
    other = write_net(tmp_path / "other", prototxt.replace("dim: 12 dim: 12", "dim: 28 dim: 20"))
    data = normal(2, 3, 28, 20)
    for name, array in run(convert(*other), {"data": data}).items():
        assert error(run(free, {"data": data})[name], array) < 1e-6


TWO_SIZES = input_layer(1, 3, 12, 16) + input_layer(1, 3, 6, 8, name="b")


@pytest.mark.parametrize(
    ("kind", "more", "reason"),
    [
        ("Eltwise", "", r"different shapes, \(N, 3, H, W\) and \(N, 3, H2, W2\)"),
        ("Concat", "", r"the shapes \(N, 3, H, W\) and \(N, 3, H2, W2\)"),
        ("Crop", "crop_param { axis: 2 offset: 1 }", "a crop of H2 from offset 1 might exceed the size H of axis 2"),
    ],
)
def test_dynamic_sizes_of_several_inputs_are_not_assumed_equal(
    kind: str, more: str, reason: str, tmp_path: Path
) -> None:
    paths = write_net(tmp_path, TWO_SIZES + layer(kind, "data b", more=more), {})
    with pytest.raises(ConversionError, match=rf"\({kind}\): .*{reason}"):
        convert(*paths, dynamic_size=True)


def test_dynamic_size_has_separate_symbols_for_each_declared_size(tmp_path: Path) -> None:
    net = TWO_SIZES + input_layer(1, 3, 12, 16, name="c") + layer("Eltwise", "data c", "s") + layer("ReLU", "b", "r")
    model = convert(*write_net(tmp_path, net, {}), dynamic_size=True)
    dims = [[dim.dim_param for dim in value.type.tensor_type.shape.dim[2:]] for value in model.graph.input]
    assert dims == [["H", "W"], ["H2", "W2"], ["H", "W"]]
    small, large = normal(1, 3, 5, 7), normal(1, 3, 9, 4)
    outputs = run(model, {"data": large, "b": small, "c": large})
    assert error(outputs["s"], 2 * large) < 1e-6
    assert error(outputs["r"], small.clip(0)) == 0


def test_dynamic_size_is_not_assumed_equal_to_a_known_size(tmp_path: Path) -> None:
    pool = layer("Pooling", tops="g", more="pooling_param { global_pooling: true }")
    paths = write_net(tmp_path, input_layer(1, 3, 1, 1) + pool + layer("Eltwise", "data g"), {})
    assert convert(*paths)
    with pytest.raises(ConversionError, match=r"different shapes, \(N, 3, H, W\) and \(N, 3, 1, 1\)"):
        convert(*paths, dynamic_size=True)


def test_dynamic_size_is_refused_if_a_layer_needs_the_size(tmp_path: Path) -> None:
    paths = write_net(tmp_path, NET, {"the_InnerProduct": [WEIGHT, BIAS]})
    with pytest.raises(ConversionError, match=r"layer 'the_InnerProduct' \(InnerProduct\): .* must be known"):
        convert(*paths, dynamic_size=True)


def test_layers_need_no_names(tmp_path: Path) -> None:
    prototxt = """
        layer { type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 4 dim: 4 } } }
        layer { type: "ReLU" bottom: "data" top: "data" }
        layer { type: "Power" bottom: "data" top: "x" power_param { shift: 1 scale: 2 } }
        layer { type: "Power" bottom: "x" top: "out" power_param { shift: 3 scale: 2 } }
    """
    data = np.random.default_rng(1).normal(size=(2, 3, 4, 4)).astype(np.float32)
    np.testing.assert_allclose(answer(tmp_path, prototxt, data=data), 3 + 2 * (1 + 2 * np.maximum(data, 0)), rtol=1e-6)
