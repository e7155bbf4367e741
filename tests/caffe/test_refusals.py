"""A net that cannot be converted exactly is refused; the message names the file or layer and the reason."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from evaluator.caffe import ConversionError, convert, wire

from .nets import Array, input_layer, layer, write_net

NET = input_layer(1, 4, 9, 11)
CONV = "convolution_param { num_output: 3 kernel_size: 3 }"
WEIGHT, BIAS = np.ones((3, 4, 3, 3)), np.zeros(3)

# Name: (prototxt, part of the message). The caffemodel is empty.
NETS = {
    "nothing": ("", "deploy.prototxt: has no layers"),
    "not a prototxt": ("PK\x03\x04", "deploy.prototxt: is not a prototxt"),
    "a value of another kind": (NET + layer("Convolution", more='convolution_param { num_output: "x" }'), "is not a"),
    "unclosed": ('layer { name: "a"', "is not a prototxt"),
    "deep": ("x { " * 5000, "nested too deep"),
    "V0": ('layers { layer { name: "conv" type: "conv" } }', "layer 'conv': is in the V0 format of 2013"),
    "both kinds": (NET + "layers { type: RELU }", "both `layer` and `layers`"),
    "only data": (layer("Data", "", "data label") + layer("ReLU"), "has only Data layers, so its input has no shape"),
    "no input": (layer("ReLU"), "has no input"),
    "data without shape": (
        NET + layer("Data", "", "more") + layer("ReLU", "more"),
        "layer 'the_ReLU' (ReLU): its bottom 'more' comes from the Data layer 'the_Data'",
    ),
    "input without shape": ('input: "data"\n' + layer("ReLU"), "1 inputs but 0 input shapes"),
    "three dims": ('input: "data" input_dim: 1 input_dim: 2 input_dim: 3\n' + layer("ReLU"), "3 input_dim"),
    "no output": (NET + layer("Silence", "data", ""), "no output at test time"),
    "training only": (NET + layer("ReLU", more="include { phase: TRAIN }"), "no output at test time"),
    "unknown layer": (NET + layer("Mystery"), "layer 'the_Mystery' (Mystery): this layer type is not supported"),
    "unknown bottom": (
        NET + layer("ReLU", "dta"),
        "layer 'the_ReLU' (ReLU): no earlier layer produces its bottom 'dta'",
    ),
    "cycle": (
        NET + layer("ReLU", "b", "a", name="one") + layer("ReLU", "a", "b", name="two"),
        "layer 'one' (ReLU): no earlier layer produces its bottom 'b'",
    ),
    "one name twice": (NET + layer("ReLU", name="r") + layer("TanH", "out", "o", name="r"), "layer 'r' (TanH): two"),
    "one blob twice": (
        NET + layer("ReLU") + layer("TanH"),
        "layer 'the_TanH' (TanH): an earlier layer already produces blob 'out'",
    ),
    "one input twice": (
        NET + input_layer(1, 2).replace('name: "data"', 'name: "b"'),
        "an earlier layer already produces blob 'data'",
    ),
    "a top without a name": (
        NET + layer("ReLU").replace('"out"', '""'),
        "layer 'the_ReLU' (ReLU): has a top without a name",
    ),
    "an input without a name": (
        'input: "" input_dim: 1 input_dim: 1 input_dim: 1 input_dim: 1\n' + layer("ReLU", ""),
        "deploy.prototxt: has an input without a name",
    ),
    "two rules": (NET + layer("ReLU", more="include { phase: TEST } exclude { phase: TRAIN }"), "both include and"),
    "empty input": (input_layer(1, 0, 3, 3) + layer("ReLU"), "the shape (1, 0, 3, 3) is empty"),
    "negative input": (input_layer(1, -4, 3, 3) + layer("ReLU"), "is empty"),
    "enormous input": (input_layer(1, 2**40, 3, 3) + layer("ReLU"), "exceeds Caffe's limit of 2147483647 elements"),
    "too many axes": (input_layer(*[1] * 40) + layer("ReLU"), "40 axes"),
    "no weights": (NET + layer("Convolution", more=CONV), "(Convolution): has no weights in the caffemodel"),
    "two bottoms": (NET + layer("ReLU", "data data"), "has 2 bottoms but needs 1"),
    "two tops": (NET + layer("ReLU", tops="a b"), "has 2 tops but produces 1 blobs"),
    "no kernel": (NET + layer("Convolution", more="convolution_param { num_output: 3 }"), "0 kernel sizes"),
    "zero stride": (
        NET + layer("Convolution", more="convolution_param { num_output: 3 kernel_size: 3 stride: 0 }"),
        "stride is [0, 0]",
    ),
    "odd groups": (
        NET + layer("Convolution", more="convolution_param { num_output: 3 kernel_size: 3 group: 2 }"),
        "4 channels and 3 outputs cannot be split into 2 groups",
    ),
    "large kernel": (
        NET + layer("Convolution", more="convolution_param { num_output: 3 kernel_size: 30 }"),
        "the kernel's extent 30 is larger than the padded input, 9",
    ),
    "huge outputs": (
        NET + layer("InnerProduct", more="inner_product_param { num_output: 4294967295 }"),
        "num_output is 4294967295",
    ),
    "huge filler": (
        input_layer(1, 1, 9, 9)
        + layer(
            "Deconvolution",
            more="convolution_param { num_output: 1 kernel_size: 40000 bias_term: false "
            'weight_filler { type: "bilinear" } }',
        ),
        "the bilinear filler would make 1600000000 weights",
    ),
    "degenerate pooling": (
        input_layer(1, 3, 6, 6) + layer("Pooling", more="pooling_param { kernel_size: 1 stride: 4 }"),
        "its last window starts at 8, beyond the input size 6",
    ),
    "stochastic": (NET + layer("Pooling", more="pooling_param { pool: STOCHASTIC kernel_size: 2 }"), "stochastic"),
    "wide pad": (
        NET + layer("Pooling", more="pooling_param { kernel_size: 2 pad: 2 }"),
        "must be smaller than the kernel",
    ),
    "softmax of the batch": (NET + layer("Softmax", more="softmax_param { axis: 0 }"), "would mix the images"),
    "concat of the batch": (
        NET + layer("Concat", "data data", more="concat_param { axis: 0 }"),
        "would mix the images",
    ),
    "slice of the batch": (NET + layer("Slice", tops="a b", more="slice_param { axis: 0 }"), "would mix the images"),
    "sum of the batch": (NET + layer("Reduction"), "would mix the images"),
    "moved batch": (
        NET
        + layer("Permute", tops="p", more="permute_param { order: 1 }")
        + layer("Reshape", "p", more="reshape_param { shape { dim: -1 } }"),
        "would mix the images of a batch",
    ),
    "statistics of the batch": (
        NET + layer("BatchNorm", more="batch_norm_param { use_global_stats: false }"),
        "use_global_stats is false",
    ),
    "learning BN": (NET + layer("BN", more="bn_param { bn_mode: LEARN }"), "bn_mode is LEARN"),
    "axis": (NET + layer("Softmax", more="softmax_param { axis: 4 }"), "axis 4 does not exist in a blob with 4 axes"),
    "uneven slice": (NET + layer("Slice", tops="a b c"), "a size of 4 cannot be split into 3 equal parts"),
    "slice points": (
        NET + layer("Slice", tops="a b", more="slice_param { slice_point: 9 }"),
        "the slice points [9] do not split a size of 4 into 2",
    ),
    "other shapes": (
        NET + input_layer(1, 4, 9, 12, name="b") + layer("Eltwise", "data b"),
        "(N, 4, 9, 11) and (N, 4, 9, 12)",
    ),
    "coefficients": (NET + layer("Eltwise", "data data", more="eltwise_param { coeff: 1 }"), "1 coefficients for 2"),
    "crop": (
        NET + input_layer(1, 4, 9, 10, name="b") + layer("Crop", "data b", more="crop_param { offset: 2 }"),
        "a crop of 9 from offset 2 exceeds the size 9 of axis 2",
    ),
    "reshape": (
        NET + layer("Reshape", more="reshape_param { shape { dim: 0 dim: 7 dim: -1 } }"),
        "396 elements are not divisible by 7",
    ),
    "reshape exactly": (
        NET + layer("Reshape", more="reshape_param { shape { dim: 0 dim: 395 } }"),
        "(N, 4, 9, 11) and (N, 395) have different numbers of elements",
    ),
    "an overwritten split": (
        NET + layer("Split", tops="a b") + layer("ReLU", "a", "a") + layer("Eltwise", "a b"),
        "layer 'the_ReLU' (ReLU): overwrites 'a' in place, but in Caffe 'b' shares its memory and is read later",
    ),
    "an overwritten bottom of a flatten": (
        NET
        + layer("TanH", tops="t")
        + layer("Flatten", "t", "f", "flatten_param { axis: 3 }")
        + layer("Sigmoid", "f", "f")
        + layer("Eltwise", "t f"),
        "layer 'the_Sigmoid' (Sigmoid): overwrites 'f' in place, but in Caffe 't' shares its memory",
    ),
    "an overwritten output": (
        NET + layer("Split", tops="a b") + layer("Flatten", "a", "c") + layer("ReLU", "c", "c"),
        "layer 'the_ReLU' (ReLU): overwrites 'c' in place, but in Caffe 'b' shares its memory",
    ),
    "an output with the batch on an inner axis": (
        NET + layer("Permute", more="permute_param { order: 1 order: 0 }"),
        "layer 'the_Permute' (Permute): output 'out' has the shape (4, N, 9, 11), but an output's batch must be on",
    ),
    "an output with an axis before the batch": (
        NET + layer("Reshape", more="reshape_param { shape { dim: 1 } axis: 0 num_axes: 0 }"),
        "layer 'the_Reshape' (Reshape): output 'out' has the shape (1, N, 4, 9, 11), but",
    ),
    "reshape for one of several declared batches": (
        input_layer(1, 6, name="b")
        + input_layer(2, 6)
        + layer("Silence", "b", "")
        + layer("Reshape", more="reshape_param { shape { dim: 2 dim: -1 } }"),
        "reshaping (N, 6) to (2, 3) would mix the images of a batch",
    ),
    "reshape for the declared batch": (
        input_layer(2, 6, 2) + layer("Reshape", more="reshape_param { shape { dim: 3 dim: -1 } }"),
        "reshaping (N, 6, 2) to (3, 8) would mix the images of a batch",
    ),
    "permute": (NET + layer("Permute", more="permute_param { order: 0 order: 0 }"), "is not a permutation of 4 axes"),
    "tiles": (
        NET + layer("Tile", more="tile_param { tiles: 2000000000 }"),
        "exceeds Caffe's limit of 2147483647 elements",
    ),
    "lrn": (NET + layer("LRN", more="lrn_param { local_size: 4 }"), "local_size is 4 but must be odd"),
    "negative lrn": (NET + layer("LRN", more="lrn_param { alpha: -1 }"), "alpha is -1.0"),
    "log": (NET + layer("Log", more="log_param { base: -2 }"), "the base is -2.0 but must be positive"),
    "top_k": (NET + layer("ArgMax", more="argmax_param { axis: 1 top_k: 5 }"), "top_k is 5 but must be 1 to 4"),
    "no mask": (NET + layer("Upsample", "data data"), "its second bottom is not the mask of a MAX Pooling layer"),
    "many priors": (
        input_layer(1, 3, 9000, 9000) + layer("PriorBox", "data data", more="prior_box_param { min_size: 4 }"),
        "81000000 priors",
    ),
    "large regions": (
        input_layer(1, 1, 2**30, 1)
        + input_layer(1, 5, name="r")
        + layer("ROIPooling", "data r", more="roi_pooling_param { pooled_h: 2 pooled_w: 2 }"),
        "a feature map of 1073741824 x 1",
    ),
    "many channels": (
        input_layer(1, 2**30) + layer("ShuffleChannel", more="shuffle_channel_param { group: 2 }"),
        "1073741824 channels exceed the limit",
    ),
    "no min_size": (NET + layer("PriorBox", "data data"), "needs a min_size greater than 0"),
}


@pytest.mark.parametrize("name", NETS)
def test_net_is_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    prototxt, message = NETS[name]
    with pytest.raises(ConversionError, match=re.escape(message)):
        convert(*write_net(tmp_path, prototxt, {}))


WEIGHTS: dict[str, tuple[list[Array], str]] = {
    "one blob of two": ([WEIGHT], "has only 1 weight blobs in the caffemodel"),
    "transposed weight": (
        [WEIGHT.transpose(1, 0, 2, 3), BIAS],
        "[4, 3, 3, 3] in the caffemodel but needs [3, 4, 3, 3]",
    ),
    "small weight": ([np.ones((3, 4, 3)), BIAS], "needs [3, 4, 3, 3]"),
    "long bias": ([WEIGHT, np.zeros(4)], "weight blob 1 has the shape [4] in the caffemodel but needs [3]"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    blobs, message = WEIGHTS[name]
    with pytest.raises(ConversionError, match=re.escape(message)) as caught:
        convert(*write_net(tmp_path, NET + layer("Convolution", more=CONV), {"the_Convolution": blobs}))
    assert (caught.value.layer, caught.value.layer_type) == ("the_Convolution", "Convolution")


SURPLUS: dict[str, tuple[str, list[Array], str]] = {
    "bias without bias_term": (
        layer("Convolution", more=CONV.replace("}", "bias_term: false }")),
        [WEIGHT, BIAS],
        "(Convolution): has 2 weight blobs in the caffemodel but needs 1",
    ),
    "NVIDIA's BatchNorm": (
        layer("BatchNorm"),
        [np.ones(4), np.ones(4), np.ones(1), np.ones(4), np.ones(4)],
        "(BatchNorm): has 5 weight blobs in the caffemodel but needs 3",
    ),
    "ReLU": (layer("ReLU"), [np.ones(4)], "(ReLU): has 1 weight blobs in the caffemodel but needs 0"),
    "Dropout": (layer("Dropout"), [np.ones(4)], "(Dropout): has 1 weight blobs in the caffemodel but needs 0"),
}


@pytest.mark.parametrize("name", SURPLUS)
def test_surplus_weights_are_refused(name: str, tmp_path: Path) -> None:
    prototxt, blobs, message = SURPLUS[name]
    kind = message[1:].partition(")")[0]
    with pytest.raises(ConversionError, match=re.escape(message)) as caught:
        convert(*write_net(tmp_path, NET + prototxt, {f"the_{kind}": blobs}))
    assert caught.value.layer == f"the_{kind}"


def test_weights_of_two_layers_with_one_name_are_refused(tmp_path: Path) -> None:
    paths = write_net(tmp_path, NET + layer("Convolution", more=CONV), {"the_Convolution": [WEIGHT, BIAS]})
    paths[1].write_bytes(paths[1].read_bytes() * 2)
    with pytest.raises(ConversionError, match=r"weight\.caffemodel: layer 'the_Convolution': two layers"):
        convert(*paths)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0f", "a field has the wire type 7"),
        (b"\xa2\x06\x05", "ends 5 bytes after the end"),
        (b"\xff" * 11, "a number has more than ten bytes"),
        (b"\x02\x00", "a field has the number 0"),
    ],
)
def test_broken_caffemodel_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    paths = write_net(tmp_path, NET + layer("ReLU"), {})
    paths[1].write_bytes(data)
    with pytest.raises(ConversionError, match=rf"^weight\.caffemodel: is not a caffemodel: byte \d+: .*{message}$"):
        convert(*paths)


def test_caffemodel_with_too_many_fields_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paths = write_net(tmp_path, NET + layer("ReLU"), {})
    paths[1].write_bytes(b"\x08\x00" * 1001)
    monkeypatch.setattr(wire, "MAX_FIELDS", 1000)
    with pytest.raises(ConversionError, match="the data has more than 1000 fields"):
        convert(*paths)


def test_error_names_a_missing_file_without_its_folder(tmp_path: Path) -> None:
    paths = write_net(tmp_path, NET + layer("ReLU"), {})
    for missing in (tmp_path / "no.prototxt", tmp_path):
        with pytest.raises(ConversionError, match="cannot be read") as caught:
            convert(missing, paths[1])
        assert str(tmp_path) + "/" not in str(caught.value)
    with pytest.raises(ConversionError, match=r"^no\.caffemodel: cannot be read: No such file"):
        convert(paths[0], tmp_path / "no.caffemodel")


def test_unknown_extra_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="has no blob 'fc7'"):
        convert(*write_net(tmp_path, NET + layer("ReLU"), {}), outputs=["fc7"])


def test_refused_conversion_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConversionError):
        convert(*write_net(tmp_path, NETS["unknown layer"][0], {}))
    assert capfd.readouterr() == ("", "")
