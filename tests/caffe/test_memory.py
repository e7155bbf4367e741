"""The sizes of the files bound the memory of a conversion. Sizes declared inside the files do not matter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluator.caffe import ConversionError, convert
from evaluator.caffe.shapes import Symbol

from .limited import LimitedConverter
from .nets import delimited, input_layer, layer, normal, varint, write_net

# The memory for a net of small files: the constants of priors, filters and regions are bounded.
_SMALL_BYTES = 256 * 2**20


@pytest.fixture(scope="module")
def converter() -> Iterator[LimitedConverter]:
    with LimitedConverter() as started:
        yield started


def blob_of(dims: list[int], data: bytes = b"", declared_length: int | None = None) -> bytes:
    """Serialize a blob; its shape and the declared length of its data can be wrong."""
    shape = delimited(7, delimited(1, b"".join(varint(dim & (2**64 - 1)) for dim in dims)))
    length = len(data) if declared_length is None else declared_length
    return shape + b"\x2a" + varint(length) + data


CONV = input_layer(1, 4, 9, 11) + layer("Convolution", more="convolution_param { num_output: 3 kernel_size: 3 }")
BLOBS = {
    "dims that overflow": blob_of([2**32, 2**32, 2**32]),
    "dims of two gigabytes": blob_of([2**20, 2**9]),
    "negative dims": blob_of([-3, -4, 3, 3], b"\0" * 432),
    "a thousand dims": blob_of([1] * 1000, b"\0" * 4),
    "data of four gigabytes": blob_of([3, 4, 3, 3], b"\0" * 16, declared_length=2**32),
    "data of 2**63 bytes": blob_of([3, 4, 3, 3], b"\0" * 16, declared_length=2**63 - 1),
}


@pytest.mark.parametrize("name", BLOBS)
def test_blob_header_allocates_no_memory(name: str, converter: LimitedConverter, tmp_path: Path) -> None:
    paths = write_net(tmp_path, CONV, {})
    paths[1].write_bytes(delimited(100, delimited(1, b"the_Convolution") + delimited(7, BLOBS[name])))
    assert converter.convert(_SMALL_BYTES, paths).startswith(("refused: WireError", "refused: ShapeError"))


SHAPES = {
    "image": input_layer(1, 3, 2**15, 2**15) + layer("ReLU"),
    "outputs": input_layer(1, 3) + layer("InnerProduct", more="inner_product_param { num_output: 700000000 }"),
    "kernel": input_layer(1, 8, 9999, 9999)
    + layer("Convolution", more="convolution_param { num_output: 64 kernel_size: 2000 }"),
    "filter": input_layer(1, 512, 9, 9)
    + layer(
        "Deconvolution",
        more='convolution_param { num_output: 512 group: 512 kernel_size: 180 weight_filler { type: "bilinear" } '
        "bias_term: false }",
    ),
    "priors": input_layer(1, 3, 1200, 1200)
    + layer("PriorBox", "data data", more="prior_box_param { min_size: 4 clip: false }"),
    "pooling": input_layer(1, 1, 40000, 40000)
    + layer("Pooling", more="pooling_param { pool: AVE kernel_size: 39999 pad: 9 stride: 3 }"),
    "shuffle": input_layer(1, 2**20) + layer("ShuffleChannel", more="shuffle_channel_param { group: 2 }"),
    "tiles": input_layer(1, 3, 9) + layer("Tile", more="tile_param { tiles: 50000000 }"),
    "regions": input_layer(1, 1, 4000, 4000)
    + input_layer(1, 5, name="r")
    + layer("ROIPooling", "data r", more="roi_pooling_param { pooled_h: 4000 pooled_w: 4000 }"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_prototxt_sizes_take_bounded_memory(name: str, converter: LimitedConverter, tmp_path: Path) -> None:
    result = converter.convert(_SMALL_BYTES, write_net(tmp_path, SHAPES[name], {}))
    assert "MemoryError" not in result, result


@pytest.fixture(scope="module")
def large_weight() -> NDArray[np.float32]:
    return normal(2000, 3000)


@pytest.mark.parametrize("form", ["packed", "unpacked", "double", "in pieces"])
def test_conversion_takes_at_most_three_times_the_file_size(
    form: str, large_weight: NDArray[np.float32], converter: LimitedConverter, tmp_path: Path
) -> None:
    prototxt = input_layer(1, 3000) + layer(
        "InnerProduct", more="inner_product_param { num_output: 2000 bias_term: false }"
    )
    paths = write_net(tmp_path, prototxt, {})
    flat = large_weight.reshape(-1)
    shape = delimited(7, delimited(1, varint(2000) + varint(3000)))
    if form == "packed":
        data = delimited(5, flat.tobytes())
    elif form == "unpacked":
        tags = np.full((flat.size, 1), 0x2D, np.uint8)
        data = np.hstack([tags, flat.view(np.uint8).reshape(-1, 4)]).tobytes()
    elif form == "double":
        data = delimited(8, flat.astype("<f8").tobytes())
    else:
        data = delimited(5, flat[:7].tobytes()) + delimited(5, flat[7:].tobytes())
    paths[1].write_bytes(delimited(100, delimited(1, b"the_InnerProduct") + delimited(7, shape + data)))
    size = paths[1].stat().st_size
    # The allocator requests several megabytes at a time.
    assert converter.convert(3 * size + 28 * 2**20, paths) == "converted"


def parallel(number: int, kind: str, more: str, bottom: str = "data") -> str:
    """Return `number` layers of one kind that read the same bottoms."""
    return "".join(layer(kind, bottom, f"t{i}", more, f"l{i}") for i in range(number))


def chained(number: int, kind: str, more: str, bottoms: int = 1) -> str:
    """Return `number` layers of one kind without names; all bottoms of a layer are the top of the layer before it."""
    names = ["data", *(f"t{i}" for i in range(number))]
    # The parser takes most of the time of these tests, so the layers are as short as possible.
    return "".join(
        f'layer{{type:"{kind}"' + f'bottom:"{before}"' * bottoms + f'top:"{top}"{more}}}'
        for before, top in pairwise(names)
    )


POOL = "pooling_param { kernel_size: 2 stride: 1 }"
BILINEAR = 'weight_filler { type: "bilinear" } bias_term: false'
MANY = {
    "priors": input_layer(1, 3, 1000, 1000)
    + parallel(60, "PriorBox", "prior_box_param { min_size: 4 min_size: 8 }", "data data"),
    "priors for detections": input_layer(1, 3, 500, 500)
    + layer("PriorBox", "data data", "p", "prior_box_param { min_size: 4 }")
    + input_layer(1, 1_000_000, name="loc")
    + input_layer(1, 500_000, name="conf")
    + parallel(
        60,
        "DetectionOutput",
        "detection_output_param { num_classes: 2 keep_top_k: 9 code_type: CENTER_SIZE "
        "nms_param { top_k: 9 nms_threshold: 0.5 } }",
        "loc conf p",
    ),
    "anchors": input_layer(1, 18, 300, 300)
    + input_layer(1, 36, 300, 300, name="deltas")
    + input_layer(1, 3, name="info")
    + parallel(60, "Proposal", "proposal_param { feat_stride: 16 }", "data deltas info"),
    "shuffles": input_layer(1, 2**20) + parallel(400, "ShuffleChannel", "shuffle_channel_param { group: 2 }"),
    "filters": input_layer(1, 64, 9, 9)
    + parallel(30, "Deconvolution", f"convolution_param {{ num_output: 32 kernel_size: 64 {BILINEAR} }}"),
    "shares": input_layer(1, 1, 2049, 2049)
    + parallel(40, "Pooling", "pooling_param { pool: AVE kernel_size: 4 pad: 2 stride: 2 }"),
    "regions": input_layer(1, 1, 4000, 4000)
    + input_layer(1, 5, name="r")
    + parallel(1000, "ROIPooling", "roi_pooling_param { pooled_h: 7 pooled_w: 7 }", "data r"),
    "nodes": input_layer(1, 3, 4, 4) + chained(19_000, "TanH", ""),
    "nodes of long names": input_layer(1, 3, 4, 4)
    + "".join(layer("MVN", tops=f"{'b' * 490}{i}", name=f"{'n' * 490}{i}") for i in range(3700)),
    "a name": input_layer(1, 3, 4, 4) + layer("ReLU", name="n" * 2**21),
    "a blob's name": input_layer(1, 3, 4, 4) + layer("ReLU", tops="n" * 2**21),
    "the net's name": f'name: "{"n" * 2**21}"' + input_layer(1, 3, 4, 4) + layer("ReLU"),
    "empty layers": "layer{}" * 570_000,
    "layers": input_layer(1, 3, 4, 4) + "layer{}" * 20_001,
    "rules": input_layer(1, 3, 4, 4) + layer("ReLU", more="include<>" * 450_000),
}


@pytest.mark.parametrize("name", MANY)
def test_many_layers_take_bounded_memory(name: str, converter: LimitedConverter, tmp_path: Path) -> None:
    result = converter.convert(_SMALL_BYTES, write_net(tmp_path, MANY[name], {}))
    assert result == "converted" or result.startswith("refused: "), result
    assert "MemoryError" not in result, result
    assert len(result) < 800


# Without digests of long names, the formulas of these sizes would take at least a hundred megabytes.
DYNAMIC = {
    "concatenated": chained(28, "Concat", "concat_param { axis: 2 }", 2),
    "pooled": chained(3000, "Pooling", POOL),
    "tiled": chained(3000, "Tile", "tile_param { axis: 2 tiles: 1000000000 }"),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_computed_symbolic_sizes_take_bounded_memory(name: str, converter: LimitedConverter, tmp_path: Path) -> None:
    paths = write_net(tmp_path, input_layer(1, 3, 4, 4) + DYNAMIC[name], {})
    assert converter.convert(_SMALL_BYTES // 4, paths, dynamic_size=True) == "converted"


def test_equal_sizes_have_equal_symbols_of_bounded_length() -> None:
    long = "+".join(["H"] * 1000)
    assert Symbol(long) == Symbol(long) != Symbol(long + "+H")
    assert len(Symbol(long).name) < 100


def test_weights_in_too_many_pieces_are_refused(converter: LimitedConverter, tmp_path: Path) -> None:
    paths = write_net(tmp_path, CONV, {})
    pieces = b"\x2a\x04\0\0\0\0" * 490_000
    paths[1].write_bytes(delimited(100, delimited(1, b"the_Convolution") + delimited(7, pieces)))
    assert "a blob has more than 10000 pieces" in converter.convert(64 * 2**20, paths)


def test_too_many_blobs_are_refused(converter: LimitedConverter, tmp_path: Path) -> None:
    paths = write_net(tmp_path, CONV, {})
    paths[1].write_bytes(delimited(100, delimited(1, b"x") + delimited(7, b"") * 490_000))
    assert "layer 'x' has more than 1000 blobs" in converter.convert(64 * 2**20, paths)


def test_weights_do_not_count_against_the_limit_for_generated_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys.modules["evaluator.caffe.convert"], "GENERATED_BYTES", 2**20)
    param = "inner_product_param { num_output: 2000 bias_term: false }"
    prototxt = input_layer(1, 1000) + layer("InnerProduct", more=param)
    weight = normal(2000, 1000)
    assert weight.nbytes > 2**20
    convert(*write_net(tmp_path, prototxt, {"the_InnerProduct": [weight]}))


def test_memory_error_becomes_a_conversion_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paths = write_net(tmp_path, CONV)
    converting = sys.modules["evaluator.caffe.convert"]
    for step in ("read_bytes", "parse_net", "plan_net", "parse_weights", "build"):
        with monkeypatch.context() as patch:
            patch.setattr(converting, step, _out_of_memory)
            with pytest.raises(ConversionError, match=r"^deploy\.prototxt: needs more memory than is available$"):
                convert(*paths)


def _out_of_memory(*arguments: object, **options: object) -> None:
    raise MemoryError
