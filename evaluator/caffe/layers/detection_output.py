"""SSD's DetectionOutput: decode boxes, suppress overlapping ones, and list the best of every image.

Sources: Liu and others, SSD: Single Shot MultiBox Detector, 2016; and its code, github.com/weiliu89/caffe, branch ssd:
detection_output_layer.cpp and bbox_util.cpp. Each step below names the function that it follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..caffe_pb2 import DetectionOutputParameter, PriorBoxParameter
from ..graph import Value
from ..shapes import Dim, Symbol, known_product, text
from .converters import LayerContext, converts


@converts("DetectionOutput")
def detection_output(ctx: LayerContext) -> list[Value]:
    """SSD's DetectionOutput: detections as (1, 1, rows, 7), each row (image, label, score, x1, y1, x2, y2).

    Bottoms: locations (N, priors * classes * 4), or (N, priors * 4) if shared by all classes; confidences
    (N, priors * classes); priors (1, 2, priors * 4). For each image and class, the top_k best scores above the
    threshold pass through non-maximum suppression. For each image, the keep_top_k best of the rest are listed by class,
    then by falling score. An image without detections has no rows; Caffe's padding row of -1 is omitted.

    Source: DetectionOutputLayer::Forward_cpu.
    """
    sizes = _Sizes(ctx)
    boxes = _boxes(ctx, sizes)
    scores, indices = _candidates(ctx, sizes)
    candidates = _gather_boxes(ctx, sizes, boxes, indices)
    kept = _suppress(ctx, sizes, candidates, scores)
    return [_rows(ctx, sizes, candidates, scores, _best(ctx, sizes, scores, kept))]


class _Sizes:
    """The sizes that follow from the parameters and the bottoms' shapes, validated.

    Attributes:
        images: the number of images, N.
        labels: the class numbers without the background.
        top_k: the number of candidates per image and class.
        keep: the maximal number of detections per image.

    Source: DetectionOutputLayer::LayerSetUp and Reshape.
    """

    def __init__(self, ctx: LayerContext) -> None:
        locations = ctx.bottom(3, 4)
        param = ctx.param.detection_output_param
        self.images: Dim = locations.shape[0]
        self.priors = _prior_count(ctx, ctx.bottoms[2])
        self.classes = param.num_classes
        self.shared = param.share_location
        if not 1 <= self.classes < 2**20:
            ctx.fail(f"num_classes is {self.classes}")
        per_prior = 4 if self.shared else 4 * self.classes
        for value, wanted in ((locations, self.priors * per_prior), (ctx.bottoms[1], self.priors * self.classes)):
            if known_product(value.shape[1:], "the number of a bottom's elements") != wanted:
                ctx.fail(
                    f"a bottom has the shape {text(value.shape)} but needs {wanted} numbers for {self.priors} priors"
                )
        background = param.background_label_id
        self.labels = [label for label in range(self.classes) if label != background]
        if not self.labels:
            ctx.fail("has no class other than the background")
        if param.nms_param.eta != 1:
            ctx.fail("adaptive suppression (eta other than 1) is not supported")
        if not param.nms_param.nms_threshold >= 0:
            ctx.fail(f"nms_threshold is {param.nms_param.nms_threshold}")
        top_k = param.nms_param.top_k if param.nms_param.HasField("top_k") else -1
        self.top_k = min(top_k, self.priors) if top_k > -1 else self.priors
        every = len(self.labels) * self.top_k
        self.keep = min(param.keep_top_k, every) if param.keep_top_k > -1 else every
        if self.top_k == 0 or self.keep == 0:
            ctx.fail("top_k or keep_top_k is 0, so it detects nothing")

    def flat(self, number: int) -> Dim:
        """Return N * number."""
        return self.images * number if isinstance(self.images, int) else Symbol(self.images.name, number)


def _prior_count(ctx: LayerContext, priors: Value) -> int:
    if len(priors.shape) < 3 or priors.shape[1] != 2:
        ctx.fail(f"its third bottom has the shape {text(priors.shape)}, not (1, 2, priors * 4)")
    numbers = known_product(priors.shape[2:], "the number of priors")
    if numbers % 4:
        ctx.fail(f"its third bottom has {numbers} numbers per row, not a multiple of four")
    return numbers // 4


@dataclass(frozen=True)
class _Priors:
    """The priors' corners (low is x1, y1 and high is x2, y2) and their variances, float32 (priors, 2) each."""

    low: Value
    high: Value
    variance_low: Value
    variance_high: Value


def _priors(ctx: LayerContext, sizes: _Sizes) -> _Priors:
    """Split the priors and variances into pairs, at conversion time if the priors are a constant of PriorBox layers.

    Source: GetPriorBBoxes in bbox_util.cpp.
    """
    value = ctx.bottoms[2]
    shape = (2, sizes.priors, 4)
    array = ctx.graph.constants.get(value.name)
    names = ("low", "high", "variance_low", "variance_high")
    if array is not None:
        both: NDArray[np.float32] = array[0].reshape(shape)
        parts = [both[0, :, :2], both[0, :, 2:], both[1, :, :2], both[1, :, 2:]]
        return _Priors(
            *(
                ctx.constant(np.ascontiguousarray(part), f"prior_{name}")
                for part, name in zip(parts, names, strict=True)
            )
        )
    first = ctx.emit("Gather", [value, ctx.constant(0, "first")], value.shape[1:], axis=0)
    grouped = ctx.reshape(first, shape)
    half = ((2, sizes.priors, 2), np.float32)
    pairs = ctx.emit_many("Split", [grouped, ctx.constant([2, 2], "halves")], [half, half], axis=2)
    rows = [
        ctx.emit("Gather", [pair, ctx.constant(row, "row")], (sizes.priors, 2), axis=0)
        for row in (0, 1)
        for pair in pairs
    ]
    return _Priors(*rows)


def _boxes(ctx: LayerContext, sizes: _Sizes) -> Value:
    """Decode the locations to corners: (N, priors, 4), or (N, priors, classes, 4) if not shared.

    Source: GetLocPredictions and DecodeBBoxesAll in bbox_util.cpp.
    """
    param = ctx.param.detection_output_param
    priors = _priors(ctx, sizes)
    if sizes.shared:
        lead: tuple[Dim, ...] = (sizes.images, sizes.priors)
    else:
        lead = (sizes.images, sizes.priors, sizes.classes)
        wide = [
            ctx.reshape(value, (sizes.priors, 1, 2))
            for value in (priors.low, priors.high, priors.variance_low, priors.variance_high)
        ]
        priors = _Priors(*wide)
    locations = ctx.reshape(ctx.bottoms[0], (*lead, 4))
    pair = (*lead, 2)
    first, second = ctx.emit_many(
        "Split", [locations, ctx.constant([2, 2], "halves")], [(pair, np.float32)] * 2, axis=len(lead)
    )
    if not param.variance_encoded_in_target:
        first = ctx.emit("Mul", [first, priors.variance_low], pair)
        second = ctx.emit("Mul", [second, priors.variance_high], pair)
    low, high = _decode(ctx, param, priors, first, second)
    return ctx.emit("Concat", [low, high], (*lead, 4), axis=len(lead))


def _decode(
    ctx: LayerContext, param: DetectionOutputParameter, priors: _Priors, first: Value, second: Value
) -> tuple[Value, Value]:
    """Decode pairs of location numbers to the low and high corners, in the given shape of the pairs.

    With CORNER, the numbers are offsets of the corners; with CORNER_SIZE, multiples of the prior's size. With
    CENTER_SIZE (SSD, section 2.2), the first pair moves the centre by multiples of the prior's size, and the second is
    the logarithm of the size's factor.

    Source: DecodeBBox in bbox_util.cpp.
    """
    pair = first.shape
    if param.code_type == PriorBoxParameter.CORNER:
        return ctx.emit("Add", [first, priors.low], pair), ctx.emit("Add", [second, priors.high], pair)
    size = _of_constants(ctx, "Sub", priors.high, priors.low)
    if param.code_type == PriorBoxParameter.CORNER_SIZE:
        moved = [ctx.emit("Mul", [part, size], pair) for part in (first, second)]
        return ctx.emit("Add", [moved[0], priors.low], pair), ctx.emit("Add", [moved[1], priors.high], pair)
    two = ctx.constant(2.0, "two")
    middle = _of_constants(ctx, "Div", _of_constants(ctx, "Add", priors.low, priors.high), two)
    centre = ctx.emit("Add", [ctx.emit("Mul", [first, size], pair), middle], pair)
    half_prior = _of_constants(ctx, "Div", size, two)
    half = ctx.emit("Mul", [ctx.emit("Exp", [second], pair), half_prior], pair)
    return ctx.emit("Sub", [centre, half], pair), ctx.emit("Add", [centre, half], pair)


def _of_constants(ctx: LayerContext, op: str, left: Value, right: Value) -> Value:
    """Apply `op` at conversion time to two constants, or add a node if one of the values is no constant."""
    arrays = [ctx.graph.constants.get(value.name) for value in (left, right)]
    if arrays[0] is None or arrays[1] is None:
        return ctx.emit(op, [left, right], left.shape)
    function = {"Add": np.add, "Sub": np.subtract, "Div": np.divide}[op]
    return ctx.constant(function(arrays[0], arrays[1]), f"prior_{op.lower()}")


def _candidates(ctx: LayerContext, sizes: _Sizes) -> tuple[Value, Value]:
    """Return the top_k scores of each image and class, falling, and their priors' indices: (N, labels, top_k) each.

    Source: GetConfidenceScores and GetMaxScoreIndex in bbox_util.cpp. The threshold is applied later, in `_suppress`.
    """
    labels = len(sizes.labels)
    confidences = ctx.reshape(ctx.bottoms[1], (sizes.images, sizes.priors, sizes.classes))
    scores = ctx.transpose(confidences, (0, 2, 1))
    if labels < sizes.classes:
        index = ctx.constant(sizes.labels, "labels")
        scores = ctx.emit("Gather", [scores, index], (sizes.images, labels, sizes.priors), axis=1)
    shape = (sizes.images, labels, sizes.top_k)
    best, indices = ctx.emit_many(
        "TopK", [scores, ctx.constant([sizes.top_k], "top_k")], [(shape, np.float32), (shape, np.int64)], axis=2
    )
    return best, indices


def _gather_boxes(ctx: LayerContext, sizes: _Sizes, boxes: Value, indices: Value) -> Value:
    """Return the candidates' boxes, (N * labels, top_k, 4)."""
    labels = len(sizes.labels)
    if not sizes.shared:
        boxes = ctx.transpose(boxes, (0, 2, 1, 3))
        if labels < sizes.classes:
            index = ctx.constant(sizes.labels, "labels")
            boxes = ctx.emit("Gather", [boxes, index], (sizes.images, labels, sizes.priors, 4), axis=1)
    shape = (sizes.images, labels, sizes.top_k)
    index = ctx.emit("Unsqueeze", [indices, ctx.constant([3], "axes")], (*shape, 1), np.int64)
    found = ctx.emit("GatherND", [boxes, index], (*shape, 4), batch_dims=1 if sizes.shared else 2)
    return ctx.reshape(found, (sizes.flat(labels), sizes.top_k, 4))


def _suppress(ctx: LayerContext, sizes: _Sizes, boxes: Value, scores: Value) -> Value:
    """Suppress candidates below the threshold and those that overlap a better one of their image and class.

    Returns:
        int64 (kept,): the remaining candidates' indices in N * labels * top_k.

    Source: ApplyNMSFast and JaccardOverlap in bbox_util.cpp.
    """
    param = ctx.param.detection_output_param
    labels = len(sizes.labels)
    if param.code_type != PriorBoxParameter.CENTER_SIZE:
        boxes = _without_inverted(ctx, boxes)
    inputs: list[Value] = [
        boxes,
        ctx.reshape(scores, (sizes.flat(labels), 1, sizes.top_k)),
        ctx.constant([sizes.top_k], "most"),
        # onnxruntime allows no threshold above 1. The clamp changes nothing, because no overlap exceeds 1.
        ctx.constant([min(param.nms_param.nms_threshold, 1.0)], "overlap"),
    ]
    if param.HasField("confidence_threshold"):
        inputs.append(ctx.constant([param.confidence_threshold], "threshold"))
    chosen = ctx.emit("NonMaxSuppression", inputs, (Symbol("kept"), 3), np.int64)
    # A chosen box is (row, 0, column) in rows of top_k candidates; its index is row * top_k + column.
    weights = ctx.constant([[sizes.top_k], [0], [1]], "strides")
    index = ctx.emit("MatMul", [chosen, weights], (Symbol("kept"), 1), np.int64)
    return ctx.emit("Squeeze", [index, ctx.constant([1], "last_axis")], (Symbol("kept"),), np.int64)


def _without_inverted(ctx: LayerContext, boxes: Value) -> Value:
    """Make boxes with swapped corners empty, so that they overlap no other box.

    Source: BBoxSize in bbox_util.cpp, which gives such boxes the size 0.
    """
    pair = (*boxes.shape[:2], 2)
    low, high = ctx.emit_many("Split", [boxes, ctx.constant([2, 2], "halves")], [(pair, np.float32)] * 2, axis=2)
    return ctx.emit("Concat", [low, ctx.emit("Max", [low, high], pair)], boxes.shape, axis=2)


def _best(ctx: LayerContext, sizes: _Sizes, scores: Value, kept: Value) -> Value:
    """Select the keep_top_k best candidates of every image.

    Returns:
        int64 (rows,): the candidates' indices in N * labels * top_k, in the order of the output's rows.

    Source: the keep_top_k part of DetectionOutputLayer::Forward_cpu, with SortScorePairDescend.
    """
    every = len(sizes.labels) * sizes.top_k
    flat = ctx.reshape(scores, (sizes.flat(every),))
    length = ctx.emit("Shape", [flat], (1,), np.int64)
    nothing = ctx.emit("ConstantOfShape", [length], flat.shape, value=np.array([-np.inf], np.float32))
    kept_scores = ctx.emit("Gather", [flat, kept], kept.shape, axis=0)
    sparse = ctx.emit("ScatterElements", [nothing, kept, kept_scores], flat.shape, axis=0)
    shape = (sizes.images, sizes.keep)
    best, position = ctx.emit_many(
        "TopK",
        [ctx.reshape(sparse, (sizes.images, every)), ctx.constant([sizes.keep], "keep_top_k")],
        [(shape, np.float32), (shape, np.int64)],
        axis=1,
    )
    found = ctx.emit("Greater", [best, ctx.constant(-np.inf, "nothing")], shape, np.bool_)
    # Candidates have the order of the rows: by class, then by falling score. So sort the best candidates by index,
    # with unused slots at the end.
    end = ctx.constant(every, "end")
    marked = ctx.emit("Where", [found, position, end], shape, np.int64)
    ordered = ctx.emit_many(
        "TopK", [marked, ctx.constant([sizes.keep], "keep_top_k")], [(shape, np.int64)] * 2, axis=1, largest=0
    )[0]
    there = ctx.emit("Less", [ordered, end], shape, np.bool_)
    at = ctx.transpose(ctx.emit("NonZero", [there], (2, Symbol("rows")), np.int64), (1, 0))
    within = ctx.emit("GatherND", [ordered, at], (Symbol("rows"),), np.int64)
    image = ctx.emit("Gather", [at, ctx.constant(0, "image")], (Symbol("rows"),), np.int64, axis=1)
    before = ctx.emit("Mul", [image, end], image.shape, np.int64)
    return ctx.emit("Add", [before, within], image.shape, np.int64)


def _rows(ctx: LayerContext, sizes: _Sizes, boxes: Value, scores: Value, index: Value) -> Value:
    """Assemble the output rows from the selected candidates, (1, 1, rows, 7).

    Source: the end of DetectionOutputLayer::Forward_cpu.
    """
    labels, rows = len(sizes.labels), Symbol("rows")
    every = labels * sizes.top_k
    axes = ctx.constant([1], "last_axis")

    def column(value: Value) -> Value:
        number = value if value.dtype == np.float32 else ctx.emit("Cast", [value], (rows,), to=1)
        return ctx.emit("Unsqueeze", [number, axes], (rows, 1))

    image = ctx.emit("Div", [index, ctx.constant(every, "an_image")], (rows,), np.int64)
    within = ctx.emit("Mod", [index, ctx.constant(every, "an_image")], (rows,), np.int64)
    label_index = ctx.emit("Div", [within, ctx.constant(sizes.top_k, "a_class")], (rows,), np.int64)
    label_ids = ctx.constant(np.asarray(sizes.labels, np.float32), "label_ids")
    label = ctx.emit("Gather", [label_ids, label_index], (rows,), axis=0)
    score = ctx.emit("Gather", [ctx.reshape(scores, (sizes.flat(every),)), index], (rows,), axis=0)
    flat = ctx.reshape(boxes, (sizes.flat(every), 4))
    box = ctx.emit("Gather", [flat, index], (rows, 4), axis=0)
    table = ctx.emit("Concat", [column(image), column(label), column(score), box], (rows, 7), axis=1)
    return ctx.emit("Unsqueeze", [table, ctx.constant([0, 1], "lead")], (1, 1, rows, 7))
