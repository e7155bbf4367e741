"""Summarize a converted net: shapes, parameters and multiply-adds."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import onnx

from .saving import size

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class LayerSummary:
    """One ONNX node.

    Attributes:
        name: the node's name, which begins with the Caffe layer's name.
        op: the ONNX operator.
        shapes: the shapes of its outputs; a size known only at run time is a symbol's name or "?".
        parameters: the count of numbers in its weights, without weights that an earlier node already counts.
        multiply_adds: the multiply-adds for one image; 0 unless the node is a convolution, deconvolution or inner
            product.
    """

    name: str
    op: str
    shapes: tuple[Shape, ...]
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Summary:
    """A model.

    Attributes:
        inputs, outputs: the shapes by name.
        layers: the nodes, in execution order.
        parameters, multiply_adds: totals over all nodes, for one image.
        size: the size of the ONNX file in bytes.
        metadata: the model's metadata properties.
    """

    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    layers: tuple[LayerSummary, ...]
    parameters: int
    multiply_adds: int
    opset: int
    size: int
    metadata: dict[str, str]


def summarize(model: onnx.ModelProto) -> Summary:
    """Summarize a model that `convert` returned."""
    graph = model.graph
    infos = [*graph.input, *graph.output, *graph.value_info]
    shapes = {info.name: _shape(info) for info in infos}
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    layers = []
    counted: set[str] = set()
    for node in graph.node:
        own = [name for name in dict.fromkeys(node.input) if name in floats and name not in counted]
        counted.update(own)
        layers.append(
            LayerSummary(
                node.name,
                node.op_type,
                tuple(shapes.get(name, ("?",)) for name in node.output),
                sum(prod(weights[name]) for name in own),
                _multiply_adds(node, shapes, weights),
            )
        )
    return Summary(
        inputs={info.name: shapes[info.name] for info in graph.input},
        outputs={info.name: shapes[info.name] for info in graph.output},
        layers=tuple(layers),
        parameters=sum(layer.parameters for layer in layers),
        multiply_adds=sum(layer.multiply_adds for layer in layers),
        opset=next(entry.version for entry in model.opset_import if entry.domain == ""),
        size=size(model),
        metadata={entry.key: entry.value for entry in model.metadata_props},
    )


def _shape(info: onnx.ValueInfoProto) -> Shape:
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in info.type.tensor_type.shape.dim
    )


def _multiply_adds(node: onnx.NodeProto, shapes: dict[str, Shape], weights: dict[str, tuple[int, ...]]) -> int:
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
        return 0
    weight = weights.get(node.input[1], ())
    if node.op_type == "Gemm":
        return prod(weight) * _rows(shapes.get(node.output[0], ()))
    # A convolution uses every weight once per output position, a deconvolution once per input position.
    positions = shapes.get(node.output[0] if node.op_type == "Conv" else node.input[0], ())[2:]
    return prod(weight) * prod(dim for dim in positions if isinstance(dim, int))


def _rows(shape: Shape) -> int:
    """Return the rows per image of a matrix: 5 if its first dimension is 5*N."""
    first = str(shape[0]) if shape else ""
    factor = first.split("*")[0]
    return int(factor) if factor.isdigit() else 1
