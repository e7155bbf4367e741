"""Files that ask for more than they are get no memory for it: a conversion takes what its files' sizes allow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from .nets import delimited, input_layer, layer, normal, varint, write_net

ROOT = Path(__file__).parents[2]
# What a net of no size may take beside the interpreter: constants of SSD's priors, of filters, of regions, are bounded.
_SMALL = 256 * 2**20
# The limit counts what is asked for, used or not, so the smallest of these files would do to break it.
_CONVERT = """
import resource, sys
import numpy as np, onnx
from evaluator.caffe import ConversionError, convert
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
limit = size + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    convert(*sys.argv[1:3])
    print("a model")
except ConversionError as error:
    print("refused:", type(error.__cause__).__name__, error)
"""


def converted_within(limit: int, paths: tuple[Path, Path]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _CONVERT, *paths, str(limit)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def blob_of(dims: list[int], data: bytes = b"", promised: int | None = None) -> bytes:
    """A blob whose shape, and whose data's length, may be a lie."""
    shape = delimited(7, delimited(1, b"".join(varint(dim & (2**64 - 1)) for dim in dims)))
    length = len(data) if promised is None else promised
    return shape + b"\x2a" + varint(length) + data


CONV = input_layer(1, 4, 9, 11) + layer("Convolution", more="convolution_param { num_output: 3 kernel_size: 3 }")
BLOBS = {
    "dims that overflow": blob_of([2**32, 2**32, 2**32]),
    "dims of two gigabytes": blob_of([2**20, 2**9]),
    "negative dims": blob_of([-3, -4, 3, 3], b"\0" * 432),
    "a thousand dims": blob_of([1] * 1000, b"\0" * 4),
    "data of four gigabytes": blob_of([3, 4, 3, 3], b"\0" * 16, promised=2**32),
    "data of 2**63 bytes": blob_of([3, 4, 3, 3], b"\0" * 16, promised=2**63 - 1),
}


@pytest.mark.parametrize("name", BLOBS)
def test_header_of_a_blob_allocates_nothing(name: str, tmp_path: Path) -> None:
    paths = write_net(tmp_path, CONV, {})
    paths[1].write_bytes(delimited(100, delimited(1, b"the_Convolution") + delimited(7, BLOBS[name])))
    assert converted_within(_SMALL, paths).startswith(("refused: WireError", "refused: ShapeError"))


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
def test_sizes_in_a_prototxt_take_bounded_memory(name: str, tmp_path: Path) -> None:
    said = converted_within(_SMALL, write_net(tmp_path, SHAPES[name], {}))
    assert "MemoryError" not in said, said


@pytest.mark.parametrize("form", ["packed", "unpacked", "double", "in pieces"])
def test_net_is_converted_in_three_times_its_size_however_its_weights_are_stored(form: str, tmp_path: Path) -> None:
    prototxt = input_layer(1, 3000) + layer(
        "InnerProduct", more="inner_product_param { num_output: 3500 bias_term: false }"
    )
    paths = write_net(tmp_path, prototxt, {})
    weight = normal(3500, 3000)
    flat = weight.reshape(-1)
    shape = delimited(7, delimited(1, varint(3500) + varint(3000)))
    if form == "packed":
        data = delimited(5, weight.tobytes())
    elif form == "unpacked":
        tags = np.full((flat.size, 1), 0x2D, np.uint8)
        data = np.hstack([tags, flat.view(np.uint8).reshape(-1, 4)]).tobytes()
    elif form == "double":
        data = delimited(8, weight.astype("<f8").tobytes())
    else:
        data = delimited(5, flat[:7].tobytes()) + delimited(5, flat[7:].tobytes())
    paths[1].write_bytes(delimited(100, delimited(1, b"the_InnerProduct") + delimited(7, shape + data)))
    size = paths[1].stat().st_size
    # An allocator takes some megabytes at a time.
    assert converted_within(3 * size + 48 * 2**20, paths) == "a model\n"
