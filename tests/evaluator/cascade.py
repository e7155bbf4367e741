"""A net.py with two nets: the first finds digits on an image, the second names each from an enlarged part of it.

The release's net is the example digits-detect. Its tar also has the net and the mean of digits-segment, as
``second.prototxt``, ``second.caffemodel`` and ``second.binaryproto``.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from evaluator import scripting

Array = NDArray[Any]

MIN_SCORE = 0.5
MARGIN = 2.5
"""The side of the second net's part of the image, relative to the side of the box."""


def net_init(cfg: dict[str, Any]) -> dict[str, Any]:
    files = cfg["tar_files"]
    first = scripting.net(cfg)
    second = scripting.Net(files["second.prototxt"], files["second.caffemodel"], scripting.TEST)
    second_cfg = {**cfg, "tar_files": {"mean.binaryproto": files["second.binaryproto"]}}
    return {
        "error": "",
        "batch_size": 1,
        "first": first,
        "second": second,
        "first_input": scripting.transformer(cfg, first.blobs["data"].shape),
        "second_input": scripting.transformer(second_cfg, second.blobs["data"].shape),
        "names": scripting.labels(files["labels.csv"]),
    }


def net_inference(model: dict[str, Any], args: dict[str, Any]) -> list[dict[str, Any]]:
    image = scripting.read_image(args["reqs"][0]["data"]["body"])
    boxes = find(model, image)
    labels = name(model, [enlarged(image, box) for box in boxes])
    digits = [
        {"box": box.round().tolist(), "class": model["names"][label]} for box, label in zip(boxes, labels, strict=True)
    ]
    return [{"code": 0, "message": "", "result": {"digits": digits}}]


def find(model: dict[str, Any], image: Array) -> Array:
    """Return the boxes of the first net, (n, 4): left, top, right, bottom in pixels of the image."""
    (rows,) = model["first"].forward(data=model["first_input"](image)[np.newaxis]).values()
    rows = rows.reshape(-1, 7)
    height, width = image.shape[:2]
    sure: Array = rows[rows[:, 2] >= MIN_SCORE, 3:] * [width, height, width, height]
    return sure


def enlarged(image: Array, box: Array) -> Array:
    """Return a square around a box as 128x128 pixels; outside the image, repeat its edge."""
    side = MARGIN * max(box[2] - box[0], box[3] - box[1])
    left, top = (box[0] + box[2] - side) / 2, (box[1] + box[3] - side) / 2
    scale = 128 / side
    move = np.array([[scale, 0, -left * scale], [0, scale, -top * scale]])
    return cv2.warpAffine(image, move, (128, 128), borderMode=cv2.BORDER_REPLICATE)


def name(model: dict[str, Any], parts: list[Array]) -> list[int]:
    """Run the parts as one batch, and return the likeliest label of each part's middle."""
    if not parts:
        return []
    (maps,) = model["second"].forward(data=np.stack([model["second_input"](part) for part in parts])).values()
    # The box lies in the middle. Label 0 is the background.
    middle = maps[:, 1:, 38:90, 38:90].mean(axis=(2, 3))
    return [int(label) + 1 for label in middle.argmax(axis=1)]
