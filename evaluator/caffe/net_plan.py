"""Select the layers of a prototxt that run at test time, and resolve their blobs in single-assignment form.

Caffe lets a layer overwrite its input blob. In a plan every top is a separate `BlobRef`: the blob's name plus the
number of earlier writes to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .caffe_pb2 import TEST, NetState, NetStateRule
from .errors import ConversionError
from .prototxt import LayerSpec, NetSpec

DATA_TYPES = frozenset(
    {
        "AnnotatedData",
        "Data",
        "DenseImageData",
        "DummyData",
        "HDF5Data",
        "ImageData",
        "ImageSegData",
        "MemoryData",
        "VideoData",
        "WindowData",
    }
)
# Layers at the end of a training net. They need labels, and a deploy net has none. SoftmaxWithLoss is not listed,
# because it is converted to a Softmax.
LOSS_TYPES = frozenset(
    {
        "Accuracy",
        "ContrastiveLoss",
        "DetectionEvaluate",
        "EuclideanLoss",
        "HDF5Output",
        "HingeLoss",
        "InfogainLoss",
        "MultiBoxLoss",
        "MultinomialLogisticLoss",
        "SigmoidCrossEntropyLoss",
        "SmoothL1Loss",
    }
)


@dataclass(frozen=True)
class BlobRef:
    """The content of the blob `name` after `version` earlier writes."""

    name: str
    version: int


@dataclass(frozen=True)
class NetLayer:
    """One layer that runs at test time."""

    spec: LayerSpec
    bottoms: tuple[BlobRef, ...]
    tops: tuple[BlobRef, ...]


@dataclass
class NetPlan:
    """The part of a net that runs at test time.

    Attributes:
        inputs: the input blobs with their declared shapes (batch first), in the net's order.
        layers: in the prototxt's order, which is an execution order.
        outputs: the blobs that no layer reads, without inputs, in execution order.
        last: the last content of every blob, by name.
    """

    inputs: list[tuple[BlobRef, tuple[int, ...]]] = field(default_factory=list)
    layers: list[NetLayer] = field(default_factory=list)
    outputs: list[BlobRef] = field(default_factory=list)
    last: dict[str, BlobRef] = field(default_factory=dict)


def plan_net(net: NetSpec, file: str) -> NetPlan:
    """Return the layers that run at test time, with their blobs resolved.

    Args:
        file: the prototxt's name for error messages.

    Raises:
        ConversionError: a bottom is unknown, two layers produce one blob or have one name, the net has no output, or
            an input has no shape.
    """
    layers = [layer for layer in net.layers if runs(layer, net.state)]
    _check_names(layers, file)
    _check_has_shape(net, layers, file)
    builder = _Builder(file)
    for name, shape in net.inputs:
        builder.add_input(name, shape)
    for layer in layers:
        builder.add(layer)
    return builder.finish()


def runs(layer: LayerSpec, state: NetState) -> bool:
    """Return whether a layer is part of the net in phase TEST (Caffe's Net::FilterNet)."""
    if layer.include and layer.exclude:
        raise ConversionError("has both include and exclude rules", layer=layer.name, layer_type=layer.type)
    if layer.include:
        return any(_meets(rule, state) for rule in layer.include)
    return not any(_meets(rule, state) for rule in layer.exclude)


def _meets(rule: NetStateRule, state: NetState) -> bool:
    if rule.HasField("phase") and rule.phase != TEST:
        return False
    if rule.HasField("min_level") and state.level < rule.min_level:
        return False
    if rule.HasField("max_level") and state.level > rule.max_level:
        return False
    stages = set(state.stage)
    return stages.issuperset(rule.stage) and stages.isdisjoint(rule.not_stage)


def _check_names(layers: Iterable[LayerSpec], file: str) -> None:
    seen: set[str] = set()
    for layer in layers:
        if layer.name and layer.name in seen:
            raise ConversionError("two layers have this name", layer=layer.name, layer_type=layer.type, file=file)
        seen.add(layer.name)


def _check_has_shape(net: NetSpec, layers: Sequence[LayerSpec], file: str) -> None:
    if net.inputs or any(layer.type == "Input" for layer in layers):
        return
    if any(layer.type in DATA_TYPES for layer in layers):
        raise ConversionError(
            "has only Data layers, so its input has no shape; replace them with an Input layer", file=file
        )
    raise ConversionError("has no input", file=file)


class _Builder:
    def __init__(self, file: str) -> None:
        self._file = file
        self._plan = NetPlan()
        self._consumed: set[BlobRef] = set()
        self._made_by_data: dict[str, LayerSpec] = {}
        self._labels: set[str] = set()

    def add_input(self, name: str, shape: tuple[int, ...]) -> None:
        if not name:
            raise ConversionError("has an input without a name", file=self._file)
        if name in self._plan.last:
            raise ConversionError(f"has two inputs named {name!r}", file=self._file)
        ref = self._new(name)
        self._plan.inputs.append((ref, shape))

    def add(self, layer: LayerSpec) -> None:
        if "" in layer.tops:
            raise self._error(layer, "has a top without a name")
        if layer.type == "Input":
            self._add_input_layer(layer)
        elif layer.type in DATA_TYPES:
            self._made_by_data.update((top, layer) for top in layer.tops)
        elif layer.type in LOSS_TYPES:
            self._labels.update(layer.bottoms)
        else:
            self._add_layer(layer)

    def _add_input_layer(self, layer: LayerSpec) -> None:
        shapes = [tuple(shape.dim) for shape in layer.param.input_param.shape]
        if len(shapes) == 1:
            shapes = shapes * len(layer.tops)
        if len(shapes) != len(layer.tops):
            raise self._error(layer, f"has {len(shapes)} shapes for {len(layer.tops)} tops")
        for top, shape in zip(layer.tops, shapes, strict=True):
            if top in self._plan.last:
                raise self._error(layer, f"an earlier layer already produces blob {top!r}")
            self.add_input(top, shape)

    def _add_layer(self, layer: LayerSpec) -> None:
        names, tops = layer.bottoms, layer.tops
        if layer.type == "SoftmaxWithLoss":
            # A deploy net has no labels. If the layer has two tops, the first is the loss and the second the softmax.
            self._labels.update(names[1:])
            names, tops = names[:1], tops[1:2] or tops[:1] or (layer.name,)
        bottoms = tuple(self._bottom(layer, name) for name in names)
        self._consumed.update(bottoms)
        if len(set(tops)) != len(tops):
            raise self._error(layer, "has two tops with one name")
        for top in tops:
            if (top in self._plan.last and top not in names) or top in self._made_by_data:
                raise self._error(layer, f"an earlier layer already produces blob {top!r}")
        refs = tuple(self._new(top) for top in tops)
        self._plan.layers.append(NetLayer(layer, bottoms, refs))

    def _bottom(self, layer: LayerSpec, name: str) -> BlobRef:
        if name in self._plan.last:
            return self._plan.last[name]
        source = self._made_by_data.get(name)
        reason = f"no earlier layer produces its bottom {name!r}"
        if source is not None:
            reason = (
                f"its bottom {name!r} comes from the {source.type} layer {source.name!r}, so it has no shape; "
                "replace that layer with an Input layer"
            )
        raise self._error(layer, reason)

    def _new(self, name: str) -> BlobRef:
        before = self._plan.last.get(name)
        ref = BlobRef(name, before.version + 1 if before else 0)
        self._plan.last[name] = ref
        return ref

    def _error(self, layer: LayerSpec, reason: str) -> ConversionError:
        return ConversionError(reason, layer=layer.name, layer_type=layer.type, file=self._file)

    def finish(self) -> NetPlan:
        plan = self._plan
        # Drop labels that only losses read: clients would have to send them without any effect.
        plan.inputs = [
            (ref, shape) for ref, shape in plan.inputs if ref in self._consumed or ref.name not in self._labels
        ]
        made = [ref for layer in plan.layers for ref in layer.tops]
        plan.outputs = [ref for ref in made if ref not in self._consumed]
        if not plan.outputs:
            raise ConversionError("has no output at test time", file=self._file)
        return plan
