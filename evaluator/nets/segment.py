"""`segment`: the class of each pixel of an image; for nets that give score maps, (n, classes, h, w), or label maps.

Result: ``{"mask": a PNG as a data URI, "detections": [{"index", "class", "color", "pts", "score"}, ...]}``. The mask
has the image's size and each pixel the colour of its class; ``detections`` are the connected regions of all classes
but the background, the surest first: ``color`` is [red, green, blue], ``pts`` the outline [x, y] in pixels of the
upright image, ``score`` the mean over the region. At most 1000 regions are listed, the largest.
"""

from __future__ import annotations

import base64
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from atserving.errors import StartError
from evaluator.net_contract import Config, Model, Req, Ret
from evaluator.nets import image_input
from evaluator.nets.palette import palette
from evaluator.options import Options
from evaluator.runtime.engine import Array
from evaluator.runtime.net import Net

_MAX_REGIONS = 1000
_MAX_CLASSES = 1 << 16

Labels = NDArray[np.uint16]


@image_input.net_init
def net_init(cfg: Config) -> Model:
    """``error`` says why the release can't be served as a segmenter."""
    values = Options("custom_values", cfg["custom_values"])
    model = image_input.load(cfg)
    net: Net = model["net"]
    output = image_input.output(net, cfg, "scores or labels")
    # A label map may be without the axis of classes.
    if len(net.output_shape(output)) not in (2, 3):
        raise StartError(f"segment takes nets that give a map of classes; {output!r} is none")
    background = values.integer("background", 0)
    if not -1 <= background < _MAX_CLASSES:
        raise StartError(f"custom_values.background is {background}, should be the index of a class, or -1 for none")
    return {
        **model,
        "output": output,
        "background": background,
        "colors": palette(cfg["custom_values"].get("colors")),
    }


def net_preprocess(model: Model, req: Req) -> Req:
    """``{"input": (height, width, channels) uint8, "size": (width, height)}``. Raises InvalidArgument."""
    image_input.params(req)
    pixels, size = image_input.image(model, req, "segment")
    return {"input": pixels, "size": size}


def net_inference(model: Model, args: dict[str, Any]) -> list[Ret]:
    """One forward pass over all requests."""
    net: Net = model["net"]
    reqs = args["reqs"]
    maps = net.run({net.inputs[0]: np.stack([req["input"] for req in reqs])})[model["output"]]
    if maps.shape[0] != len(reqs) or not maps.size:
        return [{"code": 500, "message": f"the net's output is {maps.shape}, not one map an image"}] * len(reqs)
    return [_ret(model, each, req["size"]) for each, req in zip(maps, reqs, strict=True)]


def _ret(model: Model, given: Array, size: tuple[int, int]) -> Ret:
    if not np.isfinite(given).all():
        return {"code": 500, "message": "the net's output is not finite"}
    if given.ndim == 2 or given.shape[0] == 1:
        numbers = np.rint(given.reshape(given.shape[-2:]))
        if numbers.min() < 0 or numbers.max() >= _MAX_CLASSES:
            return {"code": 500, "message": "the net's output is no map of labels"}
        labels, scores = _whole_labels(model, numbers.astype(np.uint16), size), None
    else:
        labels, scores = _from_scores(model, probabilities(given), size)
    encoded = cv2.imencode(".png", model["colors"][:, ::-1][labels % len(model["colors"])])[1]
    mask = "data:image/png;base64," + base64.b64encode(encoded.tobytes()).decode()
    return {"code": 0, "message": "", "result": {"mask": mask, "detections": _detections(model, labels, scores)}}


def probabilities(scores: Array) -> Array:
    """Scores (classes, h, w) that add up to 1 as they are, others through a softmax over the classes."""
    if scores.min() >= 0 and np.allclose(scores.sum(axis=0), 1, atol=1e-3):
        return scores
    powers = np.exp(scores - scores.max(axis=0))
    result: Array = powers / powers.sum(axis=0)
    return result


def _box(model: Model, size: tuple[int, int]) -> tuple[slice, slice]:
    """Which part of an image the net has seen, as rows and columns."""
    left, top, right, bottom = np.rint(np.array(model["transformer"].window) * np.tile(size, 2)).astype(int)
    return slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1))


def _whole_labels(model: Model, seen: Labels, size: tuple[int, int]) -> Labels:
    """Labels (h, w) of what the net has seen → of the whole image, the rest of which is background."""
    whole = np.full((size[1], size[0]), max(model["background"], 0), np.uint16)
    part = whole[_box(model, size)]
    part[...] = cv2.resize(seen, (part.shape[1], part.shape[0]), interpolation=cv2.INTER_NEAREST)
    return whole


def _from_scores(model: Model, scores: Array, size: tuple[int, int]) -> tuple[Labels, Array]:
    """The likeliest class of each pixel of the image, and how likely: the scores are interpolated, not the classes.

    A class that is nowhere the likeliest in what the net gave is left out, which bounds the work and the memory.
    """
    labels = np.full((size[1], size[0]), max(model["background"], 0), np.uint16)
    best = np.zeros((size[1], size[0]), np.float32)
    box = _box(model, size)
    part, part_best = labels[box], best[box]
    for index in np.unique(scores.argmax(axis=0)).tolist():
        score = cv2.resize(scores[index], (part.shape[1], part.shape[0]), interpolation=cv2.INTER_LINEAR)
        np.copyto(part, index, where=score > part_best)
        np.maximum(part_best, score, out=part_best)
    return labels, best


def _detections(model: Model, labels: Labels, scores: Array | None) -> list[dict[str, Any]]:
    regions: list[tuple[int, dict[str, Any]]] = []
    for index in np.unique(labels).tolist():
        if index != model["background"]:
            regions += _regions(model, index, (labels == index).view(np.uint8), scores)
    largest = sorted(regions, key=lambda region: -region[0])[:_MAX_REGIONS]
    return sorted((detection for _, detection in largest), key=lambda detection: -detection["score"])


def _regions(model: Model, index: int, of_class: NDArray[np.uint8], scores: Array | None) -> list[tuple[int, Any]]:
    """The size in pixels and the detection of each region of pixels that touch, be it at a corner."""
    count, numbered = cv2.connectedComponents(of_class, connectivity=8)
    # Of the pixels of this class alone: all classes together then cost one pass over the image.
    inside = of_class.view(np.bool_)
    numbers = numbered[inside]
    areas = np.bincount(numbers, minlength=count)
    sums = areas if scores is None else np.bincount(numbers, weights=scores[inside], minlength=count)
    # The first level of CCOMP: the outer border of every region, be it in another's hole; one a region.
    borders, levels = cv2.findContours(of_class, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    color = model["colors"][index % len(model["colors"])].tolist()
    found = []
    for border, level in zip(borders, levels[0] if borders else (), strict=True):
        if level[3] < 0:
            pts = border.reshape(-1, 2)
            region = numbered[pts[0][1], pts[0][0]]
            found.append((int(areas[region]), region, pts))
    found = sorted(found, key=lambda each: -each[0])[:_MAX_REGIONS]
    return [
        (
            area,
            {
                "index": index,
                "class": image_input.class_name(model, index),
                "color": color,
                "pts": pts.tolist(),
                "score": float(min(sums[region] / area, 1.0)),
            },
        )
        for area, region, pts in found
    ]
