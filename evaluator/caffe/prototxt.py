"""Read a prototxt: the net's inputs and layers. Old (V1) layers are upgraded to the current format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf import text_format

from .caffe_pb2 import LayerParameter, NetParameter, NetState, NetStateRule, V1LayerParameter
from .errors import ConversionError

# The largest published nets have a prototxt of one megabyte. The text parser takes about a second per megabyte.
MAX_BYTES = 4 * 2**20
# The deepest published nets have about a thousand layers, each with a few messages. An empty layer takes nine letters
# in the file, but a parsed message takes a kilobyte of memory.
MAX_LAYERS = 20_000
_MAX_MESSAGES = 120_000
_MAX_NAME = 512


@dataclass(frozen=True)
class LayerSpec:
    """One layer of the prototxt.

    Attributes:
        name: as in the file; can be empty.
        type: the Caffe type in the current form: "Convolution" even if the file says CONVOLUTION.
        param: the layer's parameter messages, by their current names.
    """

    name: str
    type: str
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]
    include: Sequence[NetStateRule]
    exclude: Sequence[NetStateRule]
    param: LayerParameter


@dataclass(frozen=True)
class NetSpec:
    """The content of a prototxt: the net-level inputs with their declared shapes, and all layers of every phase."""

    name: str
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    layers: tuple[LayerSpec, ...]
    state: NetState


# The exceptions: all other V1 types are the enum's name in camel case.
_V1_TYPES = {
    "ABSVAL": "AbsVal",
    "ARGMAX": "ArgMax",
    "BNLL": "BNLL",
    "HDF5_DATA": "HDF5Data",
    "HDF5_OUTPUT": "HDF5Output",
    "LRN": "LRN",
    "MVN": "MVN",
    "RELU": "ReLU",
    "SOFTMAX_LOSS": "SoftmaxWithLoss",
    "TANH": "TanH",
}


def parse_net(data: bytes, file: str) -> NetSpec:
    """Parse a prototxt.

    Unknown fields are skipped, because every Caffe fork adds its own. A value of the wrong type in a known field is an
    error.

    Args:
        data: the file's bytes in UTF-8; invalid UTF-8 is replaced, so comments can be in any encoding.
        file: the file name for error messages.

    Raises:
        ConversionError: the data is not a prototxt, a layer is in the V0 format of 2013, or an input has no shape.
    """
    text = data.decode("utf-8-sig", "replace")
    if text.count("{") + text.count("<") > _MAX_MESSAGES:
        raise ConversionError(f"has more than {_MAX_MESSAGES} messages", file=file)
    net = NetParameter()
    try:
        text_format.Parse(text, net, allow_unknown_field=True)
    except text_format.ParseError as error:
        raise ConversionError(f"is not a prototxt: {error}", file=file) from error
    except RecursionError as error:
        raise ConversionError("is not a prototxt: its messages are nested too deep", file=file) from error
    except ValueError as error:
        raise ConversionError(f"is not a prototxt: {error}", file=file) from error
    if net.layer and net.layers:
        raise ConversionError("has both `layer` and `layers` entries", file=file)
    if len(net.layer) + len(net.layers) > MAX_LAYERS:
        raise ConversionError(f"has more than {MAX_LAYERS} layers", file=file)
    layers = tuple(_layer(layer) for layer in net.layer) or tuple(_v1_layer(layer, file) for layer in net.layers)
    if not layers:
        raise ConversionError("has no layers", file=file)
    _check_lengths(net, layers, file)
    return NetSpec(net.name, _inputs(net, file), layers, net.state)


def _check_lengths(net: NetParameter, layers: Sequence[LayerSpec], file: str) -> None:
    """Limit the length of names: a layer's name is repeated in the name of every node and weight made from it."""
    for name in (net.name, *net.input):
        if len(name) > _MAX_NAME:
            raise ConversionError(f"has the name {name!r} of more than {_MAX_NAME} letters", file=file)
    for layer in layers:
        for name in (layer.name, *layer.bottoms, *layer.tops):
            if len(name) > _MAX_NAME:
                raise ConversionError(
                    f"has the name {name!r} of more than {_MAX_NAME} letters", layer=layer.name, layer_type=layer.type
                )


def _inputs(net: NetParameter, file: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    names = tuple(net.input)
    if net.input_shape and net.input_dim:
        raise ConversionError("has both input_shape and input_dim", file=file)
    if net.input_dim:
        dims = list(net.input_dim)
        if len(dims) != 4 * len(names):
            raise ConversionError(f"has {len(dims)} input_dim for {len(names)} inputs; needs four per input", file=file)
        shapes = [tuple(dims[i : i + 4]) for i in range(0, len(dims), 4)]
    else:
        shapes = [tuple(shape.dim) for shape in net.input_shape]
    if len(shapes) != len(names):
        raise ConversionError(f"has {len(names)} inputs but {len(shapes)} input shapes", file=file)
    return tuple(zip(names, shapes, strict=True))


def _layer(layer: LayerParameter) -> LayerSpec:
    return LayerSpec(layer.name, layer.type, tuple(layer.bottom), tuple(layer.top), layer.include, layer.exclude, layer)


def _v1_layer(layer: V1LayerParameter, file: str) -> LayerSpec:
    if layer.HasField("layer"):
        raise ConversionError(
            "is in the V0 format of 2013; upgrade the file with Caffe's upgrade_net_proto_text",
            layer=layer.layer.name,
            file=file,
        )
    kind = V1LayerParameter.LayerType.Name(layer.type)
    param = LayerParameter(name=layer.name)
    for field, value in layer.ListFields():
        if field.name.endswith("_param"):
            getattr(param, field.name).CopyFrom(value)
    type_ = _V1_TYPES.get(kind) or "".join(word.capitalize() for word in kind.split("_"))
    return LayerSpec(layer.name, type_, tuple(layer.bottom), tuple(layer.top), layer.include, layer.exclude, param)
