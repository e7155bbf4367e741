"""Draw a net's result on the picture of its request. Pictures are the bytes of image files.

The functions raise StartError for a picture or a mask that OpenCV can't decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from atserving import uris
from atserving.cli import results
from atserving.errors import InvalidArgument, StartError

Pixels = NDArray[np.uint8]  # (height, width, 3), BGR
Color = tuple[int, int, int]  # blue, green, red

_LONG_SIDE = 768  # pixels; a smaller picture is enlarged to about this size, by a whole number
_LINE = 2
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_FONT_SCALE = 0.6
_PADDING = 4
_MASK_SHARE = 0.6
_WHITE: Color = (255, 255, 255)


def draw(image: bytes, result: Any) -> bytes:
    """Return a PNG of the image with the boxes or the mask of a result. Raises StartError if it has neither."""
    if results.read_as(results.Segmented, result):
        return mask(image, result)
    if results.read_as(results.Detected, result):
        return boxes(image, result)
    raise StartError("the result has no boxes and no mask to draw")


def boxes(image: bytes, result: dict[str, Any]) -> bytes:
    """Return a PNG of the image with the boxes of a ``detect`` result, with colour and name by class, and scores."""
    canvas, scale = _canvas(image)
    # The result lists the highest score first: draw it last, on top.
    for detection in reversed(result["detections"]):
        corners = np.array(detection["pts"], np.int32) * scale
        cv2.polylines(canvas, [corners], True, color_of(detection["index"]), _LINE)
    for detection in reversed(result["detections"]):
        left, top = np.array(detection["pts"]).min(axis=0) * scale
        _label(canvas, detection, (left, top), color_of(detection["index"]))
    return _png(canvas)


def mask(image: bytes, result: dict[str, Any]) -> bytes:
    """Return a PNG of the image under the mask of a ``segment`` result; regions have outlines, names and scores.

    Black pixels of the mask, the default for the background, leave the image unchanged.
    """
    canvas, scale = _canvas(image)
    try:
        small = _decode(uris.decode_data(result["mask"]), "mask")
    except InvalidArgument as error:
        raise StartError(f"the mask can't be drawn: {error}") from None
    # A script's mask may have another size than the image.
    colors = cv2.resize(small, (canvas.shape[1], canvas.shape[0]), interpolation=cv2.INTER_NEAREST)
    blended = cv2.addWeighted(colors, _MASK_SHARE, canvas, 1 - _MASK_SHARE, 0)
    canvas = np.where(colors.any(axis=2, keepdims=True), blended, canvas).astype(np.uint8)
    for detection in result["detections"]:
        # Draw through the centres of the outline's pixels.
        outline = np.array(detection["pts"], np.int32) * scale + scale // 2
        cv2.polylines(canvas, [outline], True, _WHITE, _LINE)
    for detection in reversed(result["detections"]):
        red, green, blue = detection["color"]
        _label(canvas, detection, np.array(detection["pts"]).min(axis=0) * scale, (blue, green, red))
    return _png(canvas)


def color_of(index: int) -> Color:
    """Return a light colour for a class, different from its neighbours' colours."""
    hue = np.array([[[index * 67 % 180, 150, 255]]], np.uint8)
    blue, green, red = cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0].tolist()
    return blue, green, red


def _label(canvas: Pixels, detection: dict[str, Any], corner: Sequence[int], color: Color) -> None:
    """Write name and score on a ground of that colour: above the corner if there is room, else below."""
    text = f"{detection['class']} {detection['score']:.2f}"
    (width, height), _ = cv2.getTextSize(text, _FONT, _FONT_SCALE, 1)
    left = max(0, min(int(corner[0]), canvas.shape[1] - width - 2 * _PADDING))
    top = max(0, int(corner[1]) - height - 2 * _PADDING)
    bottom_right = left + width + 2 * _PADDING, top + height + 2 * _PADDING
    cv2.rectangle(canvas, (left, top), bottom_right, color, cv2.FILLED)
    ink = (0, 0, 0) if sum(color) > 380 else _WHITE
    cv2.putText(canvas, text, (left + _PADDING, top + height + _PADDING), _FONT, _FONT_SCALE, ink, 1, cv2.LINE_AA)


def _canvas(image: bytes) -> tuple[Pixels, int]:
    """Decode the image, enlarge it if it is small, and return it with the factor."""
    pixels = _decode(image, "picture")
    scale = max(1, round(_LONG_SIDE / max(pixels.shape[:2])))
    large = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    return large.astype(np.uint8), scale


def _decode(image: bytes, name: str) -> Pixels:
    # An empty buffer is an error of another kind.
    pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR) if image else None
    if pixels is None:
        raise StartError(f"OpenCV can't decode the {name}")
    return pixels.astype(np.uint8)


def _png(canvas: Pixels) -> bytes:
    return cv2.imencode(".png", canvas)[1].tobytes()
