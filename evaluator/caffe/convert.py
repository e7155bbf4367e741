"""Convert a prototxt and a caffemodel to an ONNX model: read, plan, convert each layer, run the passes, export."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import onnx

from . import export, passes, prototxt, shapes
from .caffemodel import MAX_BYTES, parse_weights, read_bytes
from .errors import ConversionError
from .graph import Graph, Node, Value
from .layers import CONVERTERS, LayerContext, WeightSource
from .net_plan import BlobRef, NetLayer, NetPlan, plan_net
from .prototxt import NetSpec, parse_net
from .shapes import BATCH, ROIS, Dim, ShapeError, Symbol, check
from .sharing import refuse_overwritten
from .weights import CaffemodelWeights

# Called with the step ("reading", "layers" or "weights"), the amount done, and the total amount of that step.
Progress = Callable[[str, int, int], None]

# Memory for generated data: names, nodes, SSD's priors, bilinear filters. The budget for weights is separate: the
# caffemodel's size.
GENERATED_BYTES = 64 * 2**20


def convert(
    prototxt_path: str | PathLike[str],
    caffemodel_path: str | PathLike[str],
    *,
    outputs: Sequence[str] = (),
    dynamic_size: bool = False,
    progress: Progress | None = None,
) -> onnx.ModelProto:
    """Convert a Caffe net to an ONNX model (opset 22, IR 10) that computes what Caffe computes in its test phase.

    Inputs and outputs are float32 and keep the names of the Caffe blobs. The batch (axis 0) is symbolic: a batch of b
    images gives the same results as b single images, concatenated along axis 0. If a layer writes an output in place
    over an input, the output is called `<blob>/<layer>`, because ONNX names must be unique.

    Args:
        prototxt_path: the net's structure and parameters.
        caffemodel_path: the net's weights, matched by layer name.
        outputs: names of blobs to add as outputs, after the net's own; a blob written several times gives its last
            content.
        dynamic_size: keep the height and width of four-dimensional inputs symbolic too, for fully convolutional nets.
            Inputs with the same declared size share one height and width.
        progress: called with (step, amount done, total amount) during the conversion.

    Raises:
        ConversionError: a file cannot be read, or the net cannot be converted exactly. Bad input raises no other
            exception.
    """
    structure, weights = Path(prototxt_path), Path(caffemodel_path)
    try:
        return _convert(structure, weights, outputs, dynamic_size, progress or _ignore_progress)
    except MemoryError as error:
        raise ConversionError("needs more memory than is available", file=structure.name) from error


def _convert(
    structure: Path, weights: Path, outputs: Sequence[str], dynamic_size: bool, report: Progress
) -> onnx.ModelProto:
    report("reading", 0, 1)
    text = read_bytes(structure, prototxt.MAX_BYTES)
    data = read_bytes(weights, MAX_BYTES)
    net = parse_net(text, structure.name)
    plan = plan_net(net, structure.name)
    blobs = CaffemodelWeights(parse_weights(data, weights.name))
    report("reading", 1, 1)
    graph = build(
        net,
        plan,
        blobs,
        outputs=outputs,
        dynamic_size=dynamic_size,
        file=structure.name,
        progress=report,
        byte_budget=GENERATED_BYTES + len(data),
    )
    _refuse_surplus(plan, blobs)
    return export.model(
        graph,
        {
            "caffe.net": net.name,
            "caffe.layers": str(len(plan.layers)),
            "caffe.prototxt.sha256": hashlib.sha256(text).hexdigest(),
            "caffe.caffemodel.sha256": hashlib.sha256(data).hexdigest(),
        },
        structure.name,
        report,
    )


def _refuse_surplus(plan: NetPlan, blobs: CaffemodelWeights) -> None:
    """Refuse a layer with more weight blobs than its type and parameters need, as Caffe does.

    A surplus is evidence of a mismatch: the caffemodel comes from a different layer of that name.
    """
    for layer in plan.layers:
        name, stored, used = layer.spec.name, blobs.count(layer.spec.name), blobs.used(layer.spec.name)
        if stored > used:
            raise ConversionError(
                f"has {stored} weight blobs in the caffemodel but needs {used}", layer=name, layer_type=layer.spec.type
            )


def _ignore_progress(step: str, done: int, of: int) -> None:
    """Do nothing; the default for `progress`."""


def build(
    net: NetSpec,
    plan: NetPlan,
    blobs: WeightSource,
    *,
    outputs: Sequence[str] = (),
    dynamic_size: bool = False,
    file: str,
    progress: Progress = _ignore_progress,
    byte_budget: int = sys.maxsize,
) -> Graph:
    """Build the graph of a net and run all passes on it.

    Args:
        blobs: the weights; any `WeightSource`.
        file: the prototxt's name for error messages.
        byte_budget: the memory that the graph may use, in bytes.

    Raises:
        ConversionError: the net cannot be converted exactly.
    """
    graph = Graph(net.name, byte_budget=byte_budget)
    values: dict[BlobRef, Value] = {}
    # Reserve the blobs' names: values keep them in the model.
    for name in {ref.name for ref, _ in plan.inputs} | {ref.name for layer in plan.layers for ref in layer.tops}:
        graph.unique(name)
    batch = _add_inputs(graph, plan, values, dynamic_size, file)
    # Weights can be NaN or overflow. Caffe computes with them silently, and so does the converter.
    with np.errstate(all="ignore"):
        for done, layer in enumerate(plan.layers, 1):
            _add_layer(graph, layer, values, batch, blobs)
            progress("layers", done, len(plan.layers))
        wanted = [*plan.outputs, *_extra(plan, outputs, file)]
        try:
            refuse_overwritten(plan, wanted)
            _refuse_moved_batch(plan, values, wanted)
            _name_values(graph, plan, values, wanted)
            passes.run(graph)
        except ShapeError as error:
            raise ConversionError(str(error), file=file) from error
    return graph


def _add_inputs(graph: Graph, plan: NetPlan, values: dict[BlobRef, Value], dynamic_size: bool, file: str) -> int:
    """Declare the inputs. Return the declared batch size, or 0 if the inputs declare several."""
    regions = {layer.bottoms[1] for layer in plan.layers if layer.spec.type == "ROIPooling" and len(layer.bottoms) == 2}
    sizes: dict[tuple[int, ...], int] = {}
    for ref, declared in plan.inputs:
        try:
            check(declared)
        except ShapeError as error:
            raise ConversionError(f"input {ref.name!r}: {error}", file=file) from error
        if not declared:
            raise ConversionError(f"input {ref.name!r} has no axes", file=file)
        shape: list[Dim] = [Symbol(ROIS if ref in regions else BATCH), *declared[1:]]
        if dynamic_size and len(declared) == 4:
            # Inputs with one declared size are assumed to have one size at run time; others get symbols of their own.
            number = sizes.setdefault(declared[2:], len(sizes) + 1)
            shape[2:] = [Symbol(axis if number == 1 else f"{axis}{number}") for axis in "HW"]
        value = Value(ref.name, tuple(shape))
        graph.inputs.append(value)
        graph.values[ref.name] = value
        values[ref] = value
    batches = {declared[0] for ref, declared in plan.inputs if ref not in regions}
    return batches.pop() if len(batches) == 1 else 0


def _add_layer(graph: Graph, layer: NetLayer, values: dict[BlobRef, Value], batch: int, blobs: WeightSource) -> None:
    spec = layer.spec
    converter = CONVERTERS.get(spec.type)
    if converter is None:
        raise ConversionError("this layer type is not supported", layer=spec.name, layer_type=spec.type)
    context = LayerContext(
        spec.name, spec.type, spec.param, tuple(values[ref] for ref in layer.bottoms), spec.tops, batch, graph, blobs
    )
    try:
        made = converter(context)
    except ShapeError as error:
        raise ConversionError(str(error), layer=spec.name, layer_type=spec.type) from error
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        # Absurd parameters can raise these anywhere in a converter; to the user they are errors of the layer.
        raise ConversionError(f"cannot be converted: {error}", layer=spec.name, layer_type=spec.type) from error
    if len(made) != len(layer.tops):
        raise ConversionError(
            f"has {len(layer.tops)} tops but produces {len(made)} blobs", layer=spec.name, layer_type=spec.type
        )
    values.update(zip(layer.tops, made, strict=True))


def _extra(plan: NetPlan, outputs: Sequence[str], file: str) -> list[BlobRef]:
    refs = []
    for name in outputs:
        if name not in plan.last:
            raise ConversionError(f"has no blob {name!r} to make an output of", file=file)
        if any(ref == plan.last[name] for ref, _ in plan.inputs):
            raise ConversionError(f"blob {name!r} is an input and cannot be an output", file=file)
        if plan.last[name] not in plan.outputs and plan.last[name] not in refs:
            refs.append(plan.last[name])
    return refs


def _refuse_moved_batch(plan: NetPlan, values: dict[BlobRef, Value], outputs: Sequence[BlobRef]) -> None:
    """Refuse an output with the batch on another axis than 0: a client could not split it into images."""
    makers = {ref: layer.spec for layer in plan.layers for ref in layer.tops}
    for ref in outputs:
        batches = [isinstance(dim, Symbol) and dim.name in (BATCH, ROIS) for dim in values[ref].shape]
        if ref in makers and any(batches) and not batches[0]:
            shape = shapes.text(values[ref].shape)
            reason = f"output {ref.name!r} has the shape {shape}, but an output's batch must be on axis 0"
            raise ConversionError(reason, layer=makers[ref].name, layer_type=makers[ref].type)


def _name_values(graph: Graph, plan: NetPlan, values: dict[BlobRef, Value], outputs: Sequence[BlobRef]) -> None:
    """Name the values after their blobs, and add the outputs to the graph.

    Several blobs can be aliases of one value. Then each output gets a value of its own.
    """
    inputs = {value.name for value in graph.inputs}
    layer_of = {ref: layer.spec.name for layer in plan.layers for ref in layer.tops}
    names: dict[str, str] = {}
    taken: set[str] = set()

    def blob_name(ref: BlobRef) -> str:
        if plan.last[ref.name] == ref and ref.name not in inputs:
            return ref.name
        return graph.unique(f"{ref.name}/{layer_of[ref]}")

    for ref in outputs:
        if ref not in layer_of:
            raise ConversionError(f"blob {ref.name!r} is an input and cannot be an output")
        value = values[ref]
        if value.name in names or value.name in inputs or value.name in graph.constants:
            value = _copy(graph, value, layer_of[ref])
        names[value.name] = blob_name(ref)
        taken.add(names[value.name])
        graph.outputs.append(value.name)
    for ref in layer_of:
        value = values[ref]
        if value.name in names or value.name in inputs or value.name in graph.constants:
            continue
        name = blob_name(ref)
        if name not in taken:
            names[value.name] = name
            taken.add(name)
    graph.rename(names)


def _copy(graph: Graph, value: Value, layer: str) -> Value:
    """Add an Identity node, for an output that is also an input, a constant or another output."""
    made = graph.add_value(f"{layer}/output", value.shape, value.dtype)
    graph.nodes.append(Node("Identity", graph.unique_node(layer), [value.name], [made.name]))
    return made
