"""Any input gives a valid model or a ConversionError: no other exception, no crash, bounded memory and time.

FUZZ_EXAMPLES sets the number of examples per test; `make fuzz` sets it high.
"""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.descriptor import Descriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evaluator.caffe import ConversionError, convert
from evaluator.caffe.caffe_pb2 import LayerParameter
from evaluator.caffe.caffemodel import read_blob
from evaluator.caffe.layers import CONVERTERS

from .nets import FIXTURES, Array, input_layer, layer, write_net

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
CASES = sorted(path for path in FIXTURES.iterdir())
# Ample for every fixture, but far below the sizes that a damaged file can declare.
MEMORY_LIMIT = 6 * 2**30


@pytest.fixture(scope="module", autouse=True)
def _limited_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(prototxt: bytes, weights: bytes) -> None:
    """Convert, and check the model. Any exception other than ConversionError fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "deploy.prototxt", Path(folder) / "weight.caffemodel"
        paths[0].write_bytes(prototxt)
        paths[1].write_bytes(weights)
        try:
            model = convert(*paths)
        except ConversionError as error:
            assert str(error)
            assert error.file or error.layer is not None
            return
    if model.ByteSize() < 2**24:
        onnx.checker.check_model(model)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Truncate the data, flip bits, and repeat, remove or replace pieces."""
    broken = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        if not broken:
            break
        position = draw(st.integers(0, len(broken) - 1))
        match draw(st.integers(0, 4)):
            case 0:
                del broken[position:]
            case 1:
                broken[position] ^= 1 << draw(st.integers(0, 7))
            case 2:
                del broken[position : position + draw(st.integers(1, 40))]
            case 3:
                broken[position:position] = broken[position : position + draw(st.integers(1, 40))]
            case 4:
                broken[position : position + 1] = draw(st.binary(max_size=12))
    return bytes(broken)


@fuzz
@given(data=st.data(), case=st.sampled_from(CASES))
def test_damaged_prototxt(data: st.DataObject, case: Path) -> None:
    prototxt = data.draw(damaged((case / "deploy.prototxt").read_bytes()))
    attempt(prototxt, (case / "weight.caffemodel").read_bytes())


@fuzz
@given(data=st.data(), case=st.sampled_from(CASES))
def test_damaged_caffemodel(data: st.DataObject, case: Path) -> None:
    weights = data.draw(damaged((case / "weight.caffemodel").read_bytes()))
    attempt((case / "deploy.prototxt").read_bytes(), weights)


@fuzz
@given(prototxt=st.binary(max_size=300), weights=st.binary(max_size=300))
def test_random_bytes(prototxt: bytes, weights: bytes) -> None:
    attempt(prototxt, weights)
    attempt((CASES[0] / "deploy.prototxt").read_bytes(), weights)


@fuzz
@given(data=st.binary(max_size=300))
def test_random_blob(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mean.binaryproto"
        path.write_bytes(data)
        try:
            assert read_blob(path).size > 0
        except ConversionError as error:
            assert error.file == "mean.binaryproto"


@st.composite
def numbers_replaced(draw: st.DrawFn, prototxt: str) -> str:
    """Replace some of the prototxt's numbers by absurd ones."""
    words = prototxt.split(" ")
    numbers = [i for i, word in enumerate(words) if word.strip().lstrip("-").replace(".", "").isdigit()]
    for index in draw(st.lists(st.sampled_from(numbers), min_size=1, max_size=3)) if numbers else ():
        words[index] = draw(
            st.sampled_from(["0", "-1", "1", "2", "7", "31", "65536", "2147483647", "4294967295", "1000000000000"])
            | st.sampled_from(["-2147483648", "9223372036854775807", "0.5", "1e38", "-1e38", "nan", "inf", "1e-45"])
        )
    return " ".join(words)


@fuzz
@given(data=st.data(), case=st.sampled_from(CASES))
def test_absurd_numbers(data: st.DataObject, case: Path) -> None:
    prototxt = data.draw(numbers_replaced((case / "deploy.prototxt").read_text()))
    attempt(prototxt.encode(), (case / "weight.caffemodel").read_bytes())


@st.composite
def names_replaced(draw: st.DrawFn, prototxt: str) -> str:
    """Replace some of the prototxt's quoted names by empty or odd ones, or by another of its names."""
    pieces = prototxt.split('"')
    names = range(1, len(pieces), 2)
    for index in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        odd = st.sampled_from(
            ["", " ", "/", "N", "H", "data/shape", "out_1", "\\000", "\\n", "\u00e9", "\\377", "x" * 5000]
        )
        pieces[index] = draw(odd | st.sampled_from([pieces[i] for i in names]))
    return '"'.join(pieces)


@fuzz
@given(data=st.data(), case=st.sampled_from(CASES))
def test_odd_names(data: st.DataObject, case: Path) -> None:
    prototxt = data.draw(names_replaced((case / "deploy.prototxt").read_text()))
    attempt(prototxt.encode(), (case / "weight.caffemodel").read_bytes())


def parameter(draw: st.DrawFn, message: Descriptor, depth: int = 0) -> str:
    """Return the text of a message with any of its fields and any valid values."""
    fields = []
    for field in message.fields:
        for _ in range(draw(st.integers(0, 2 if field.is_repeated else 1))):
            if field.message_type:
                value = "{ " + (parameter(draw, field.message_type, depth + 1) if depth < 2 else "") + " }"
            elif field.enum_type:
                value = draw(st.sampled_from([one.name for one in field.enum_type.values]))
            elif field.cpp_type == field.CPPTYPE_BOOL:
                value = draw(st.sampled_from(["true", "false"]))
            elif field.cpp_type == field.CPPTYPE_STRING:
                value = '"bilinear"'
            elif field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
                value = draw(st.sampled_from(["0", "1", "-1", "0.5", "8", "1e30", "nan", "-inf"]))
            else:
                low = 0 if field.cpp_type in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64) else -2
                value = str(draw(st.integers(low, 4) | st.sampled_from([2**31 - 1, 100])))
            fields.append(f"{field.name}: {value}")
    return " ".join(fields)


PARAMETERS = {
    field.name: field.message_type
    for field in LayerParameter.DESCRIPTOR.fields
    if field.name.endswith("_param") and field.message_type is not None
}
_BOTTOMS = {"Eltwise": 2, "Crop": 2, "PriorBox": 2, "ROIPooling": 2, "DetectionOutput": 3, "Proposal": 3, "Axpy": 3}
SHAPES = st.lists(st.integers(1, 6), min_size=4, max_size=4) | st.lists(st.integers(1, 6), min_size=1, max_size=5)


@st.composite
def any_layer(draw: st.DrawFn) -> str:
    """Return a net with one layer of any type, with any parameters, on inputs of any small shapes."""
    kind = draw(st.sampled_from(sorted(CONVERTERS)))
    # Mostly the number that the type needs; otherwise most examples would only test that check.
    bottoms = draw(st.sampled_from([*[_BOTTOMS.get(kind, 1)] * 7, 1, 2, 4]))
    shape = draw(SHAPES)
    shapes = [shape if draw(st.booleans()) else draw(SHAPES) for _ in range(bottoms)]
    text = "".join(input_layer(*dims, name=f"b{i}") for i, dims in enumerate(shapes))
    names = " ".join(f'bottom: "b{i}"' for i in range(bottoms))
    tops = " ".join(f'top: "t{i}"' for i in range(draw(st.sampled_from([1, 1, 1, 1, 1, 2, 3, 0]))))
    # Parameters with a name like the type's, because the converter reads these.
    likely = [name for name in PARAMETERS if kind.lower()[:4] in name.replace("_", "")] or list(PARAMETERS)
    name = draw(st.sampled_from(likely))
    more = f"{name} {{ {parameter(draw, PARAMETERS[name])} }}"
    return text + f'layer {{ name: "x" type: "{kind}" {names} {tops} {more} }}'


@settings(fuzz, max_examples=EXAMPLES * 5)
@given(prototxt=any_layer())
def test_any_parameters_of_any_layer(prototxt: str) -> None:
    attempt(prototxt.encode(), b"")


@pytest.mark.parametrize(
    "prototxt",
    [
        'input: "data" ' * 15_000,
        "layer { " * 100_000,
        "# " + "x" * 3_000_000,
        'layer { name: "' + "n" * 1_000_000 + '" }',
        "input_dim: " + "9" * 100_000,
        input_layer(1, 3, 4, 4)
        + "".join(
            f'layer {{ name: "r{i}" type: "ReLU" bottom: "{"data" if i == 0 else i - 1}" top: "{i}" }}\n'
            for i in range(1000)
        ),
        input_layer(1, 3, 4, 4)
        + "".join(
            f'layer {{ name: "c{i}" type: "Concat" bottom: "{"data" if i == 0 else i - 1}" '
            f'bottom: "{"data" if i == 0 else i - 1}" top: "{i}" }}\n'
            for i in range(60)
        ),
        input_layer(1, 3, 4, 4)
        + 'layer { type: "Slice" bottom: "data" slice_param { '
        + "slice_point: 1 " * 15_000
        + "} }",
    ],
    ids=["inputs", "depth", "comment", "name", "digits", "long net", "doubling", "points"],
)
def test_large_input_takes_bounded_time(prototxt: str) -> None:
    attempt(prototxt.encode(), b"")


def test_too_large_prototxt_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "deploy.prototxt").write_bytes(b" " * (5 * 2**20))
    with pytest.raises(ConversionError, match="has 5242880 bytes, more than the limit"):
        convert(tmp_path / "deploy.prototxt", CASES[0] / "weight.caffemodel")


def test_weights_can_be_any_numbers(tmp_path: Path) -> None:
    prototxt = input_layer(1, 3, 4, 4) + layer(
        "Convolution", tops="c", more="convolution_param { num_output: 2 kernel_size: 1 }"
    )
    prototxt += layer("BatchNorm", "c", "b") + layer("Scale", "b", "out")
    odd = np.array([np.nan, np.inf, -np.inf, 1e38, -1.0, 0.0], np.float32)
    weights: dict[str, list[Array]] = {
        "the_Convolution": [odd.reshape(2, 3, 1, 1), odd[:2]],
        "the_BatchNorm": [odd[2:4], odd[3:5], np.ones(1)],
        "the_Scale": [odd[3:5]],
    }
    with np.errstate(all="raise"):
        onnx.checker.check_model(convert(*write_net(tmp_path, prototxt, weights)))
