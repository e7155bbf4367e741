"""A net.py that finds faces with the first two nets of MTCNN: a proposer on all windows, a refiner on its boxes.

The release's net is det1; det2 is in the tar too. Source: Zhang and others, Joint Face Detection and Alignment
using Multi-task Cascaded Convolutional Networks, 2016; landmarks and the third net are left out.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from evaluator import scripting

Array = NDArray[Any]

MIN_SIDE = 60.0
FACTOR = 0.71
MIN_SCORE = 0.8


def net_init(cfg: dict[str, Any]) -> dict[str, Any]:
    files = cfg["tar_files"]
    refiner = scripting.Net(files["det2.prototxt"], files["det2.caffemodel"], scripting.TEST)
    return {"error": "", "batch_size": 1, "proposer": scripting.net(cfg), "refiner": refiner}


def net_inference(model: dict[str, Any], args: dict[str, Any]) -> list[dict[str, Any]]:
    image = scripting.read_image(args["reqs"][0]["data"]["body"])
    boxes, scores = detect(model["proposer"], *pyramid(image), overlap=0.7)
    if len(boxes):
        boxes = np.array([square(box) for box in boxes])
        boxes, scores = detect(model["refiner"], boxes, [crop(image, box) for box in boxes], overlap=0.3)
    faces = [{"box": box, "score": score} for box, score in zip(boxes.round().tolist(), scores.tolist(), strict=True)]
    return [{"code": 0, "message": "", "result": {"faces": faces}}]


def pyramid(image: Array) -> tuple[Array, list[Array]]:
    """Return all square windows of the image as (left, top, width, height), and the 12x12 pixels of each."""
    boxes, patches = [], []
    side = MIN_SIDE
    while side <= min(image.shape[:2]):
        small = cv2.resize(image, None, fx=12 / side, fy=12 / side)
        windows = np.lib.stride_tricks.sliding_window_view(small, (12, 12), axis=(0, 1))[::2, ::2]
        for row, column in np.ndindex(*windows.shape[:2]):
            boxes.append([column * side / 6, row * side / 6, side, side])
            patches.append(windows[row, column].transpose(1, 2, 0))
        side /= FACTOR
    return np.array(boxes).reshape(-1, 4), patches


def square(box: Array) -> Array:
    left, top, width, height = box
    side = max(width, height)
    return np.array([left + (width - side) / 2, top + (height - side) / 2, side, side])


def crop(image: Array, box: Array) -> Array:
    """Return a square of the image as 24x24 pixels, black outside the image."""
    left, top, side, _ = box
    scale = 24 / side
    return cv2.warpAffine(image, np.array([[scale, 0, -left * scale], [0, scale, -top * scale]]), (24, 24))


def detect(net: scripting.Net, boxes: Array, patches: list[Array], overlap: float) -> tuple[Array, Array]:
    """Return a net's boxes of faces, moved as the net says, and their scores, after non-maximum suppression."""
    if not patches:
        return np.zeros((0, 4)), np.zeros(0)
    # MTCNN was trained in MATLAB: its input is RGB, with columns before rows.
    outputs = net.forward(data=(np.array(patches)[..., ::-1].transpose(0, 3, 2, 1) - 127.5) / 128)
    scores = outputs["prob1"].reshape(len(boxes), 2)[:, 1]
    (moves,) = (output.reshape(len(boxes), 4) for name, output in outputs.items() if name != "prob1")
    starts = boxes[:, :2] + moves[:, :2] * boxes[:, 2:]
    ends = boxes[:, :2] + (1 + moves[:, 2:]) * boxes[:, 2:]
    boxes = np.hstack([starts, ends - starts])
    kept = np.array(cv2.dnn.NMSBoxes(boxes.tolist(), scores.tolist(), MIN_SCORE, overlap), int)
    return boxes[kept], scores[kept]
