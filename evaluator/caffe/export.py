"""Export the graph as an ONNX model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper

from .errors import ConversionError
from .graph import Array, Graph, Node, Value
from .shapes import BATCH, ROIS, Symbol

# Explicit, because the onnx package's defaults can be newer than onnxruntime accepts. Opset 22 is the first in which
# ceil_mode of pooling has Caffe's meaning.
OPSET = 22
IR_VERSION = 10
PRODUCER = "atserving-caffe"
VERSION = "1.0.0"

# The size limit of a protocol buffer.
_MAX_BYTES = 2**31 - 1
# A tensor's overhead beyond its numbers and name: its type, and the lengths of its parts.
_TENSOR_BYTES, _DIM_BYTES = 64, 11


def model(
    graph: Graph, metadata: dict[str, str], file: str, progress: Callable[[str, int, int], None]
) -> onnx.ModelProto:
    """Build the ONNX model of `graph`.

    Constants are removed from the graph one by one, so that the weights are never in memory twice.

    Raises:
        ConversionError: the model would exceed the size limit of an ONNX file.
    """
    proto = onnx.ModelProto(
        ir_version=IR_VERSION,
        producer_name=PRODUCER,
        producer_version=VERSION,
        opset_import=[helper.make_opsetid("", OPSET)],
    )
    helper.set_model_props(proto, {"producer": f"{PRODUCER} {VERSION}", **metadata})
    out = proto.graph
    out.name = graph.name or "caffe"
    out.node.extend(_node(node) for node in graph.nodes)
    out.input.extend(_value_info(value) for value in graph.inputs)
    out.output.extend(_value_info(graph.values[name]) for name in graph.outputs)
    made = {name for node in graph.nodes for name in node.outputs} - set(graph.outputs)
    out.value_info.extend(_value_info(graph.values[name]) for name in graph.values if name in made)
    if proto.ByteSize() + _constants_size(graph) > _MAX_BYTES:
        raise ConversionError("gives a model above the 2 GiB limit of an ONNX file", file=file)
    with np.errstate(all="ignore"):
        names = list(graph.constants)
        for done, name in enumerate(names, 1):
            _tensor(out.initializer.add(), name, graph.take_constant(name))
            progress("weights", done, len(names))
    return proto


def _constants_size(graph: Graph) -> int:
    """Return an upper bound of the constants' size in the file, in bytes."""
    return sum(
        array.nbytes + len(name.encode()) + _TENSOR_BYTES + _DIM_BYTES * array.ndim
        for name, array in graph.constants.items()
    )


def _node(node: Node) -> onnx.NodeProto:
    attributes: dict[str, Any] = {}
    for key, value in node.attributes.items():
        attributes[key] = _tensor(onnx.TensorProto(), "", value) if isinstance(value, np.ndarray) else value
    return helper.make_node(node.op, node.inputs, node.outputs, name=node.name, **attributes)


def _tensor(tensor: onnx.TensorProto, name: str, array: Array) -> onnx.TensorProto:
    tensor.name = name
    tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor.dims.extend(array.shape)
    numbers = array.tobytes()
    # Free a temporary array before the tensor makes its own copy of the bytes.
    del array
    tensor.raw_data = numbers
    return tensor


def _value_info(value: Value) -> onnx.ValueInfoProto:
    shape = [_dim(dim) for dim in value.shape]
    return helper.make_tensor_value_info(value.name, helper.np_dtype_to_tensor_dtype(value.dtype), shape)


def _dim(dim: int | Symbol) -> int | str | None:
    if isinstance(dim, int):
        return dim
    # Sizes derived from a symbolic height are expressions of the converter, which ONNX tools cannot interpret.
    return str(dim) if dim.name in (BATCH, ROIS) or re.fullmatch("[HW][0-9]*", dim.name) else None
