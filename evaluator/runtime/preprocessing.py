"""From decoded pixels to a net's input, in Caffe's order: resize, raw_scale, channel swap, mean, input_scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from atserving.errors import StartError
from evaluator.caffe import ConversionError
from evaluator.caffe.caffemodel import read_blob
from evaluator.images import Pixels
from evaluator.options import Options

Planes = NDArray[np.float32]


@dataclass(frozen=True)
class Arithmetic:
    """What is left to do once the pixels are there: (x * raw_scale - mean) * input_scale, its constants multiplied out.

    ``order`` says which channel of the pixels is the net's first, second, ...; None leaves them. ``shift`` broadcasts
    to (channels, height, width), in the net's order; None is 0.
    """

    scale: np.float32
    order: tuple[int, ...] | None
    shift: Planes | None

    def __call__(self, pixels: Pixels) -> Planes:
        """(height, width, channels) uint8 → (channels, height, width) float32, contiguous."""
        planes = pixels.transpose(2, 0, 1)
        if self.order:
            planes = planes[list(self.order)]
        out = np.empty(planes.shape, np.float32)
        # One or two passes over the pixels.
        scaled = np.multiply(planes, self.scale, out=out) if self.scale != 1 else planes
        if self.shift is None:
            np.copyto(out, scaled)
        else:
            np.subtract(scaled, self.shift, out=out)
        return out


class Transformer:
    """Makes the input of a net of shape (n, channels, height, width), channels 3 (BGR) or 1 (grey).

    In two steps: ``pixels`` resizes, crops and makes grey, ``arithmetic`` does the rest.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        image_width: int | None = None,
        raw_scale: float = 1.0,
        channel_swap: tuple[int, ...] | None = None,
        mean: Planes | None = None,
        input_scale: float = 1.0,
    ) -> None:
        """``shape`` is (channels, height, width); ``mean`` broadcasts to it, in the order the net sees its channels.

        Raises StartError where these don't fit each other.
        """
        channels, self._height, self._width = shape
        if channels not in (1, 3):
            raise StartError(f"the net's input has {channels} channels, an image has 3 or, grey, 1")
        self._grey = channels == 1
        self.resized = self._resize_to(image_width)
        """The width and height that an image is resized to; the net sees the middle of it."""
        self.arithmetic = Arithmetic(
            np.float32(raw_scale * input_scale),
            None if self._grey else channel_swap,
            None if mean is None else mean * np.float32(input_scale),
        )

    def _resize_to(self, image_width: int | None) -> tuple[int, int]:
        if image_width is None:
            return self._width, self._height
        if image_width < self._width:
            raise StartError(f"image_width is {image_width}, less than the net's input, {self._width}")
        return image_width, round(image_width * self._height / self._width)

    @property
    def window(self) -> tuple[float, float, float, float]:
        """The part of an image that the net sees: left, top, right and bottom as shares of its width and height."""
        left, top = (self.resized[0] - self._width) // 2, (self.resized[1] - self._height) // 2
        width, height = self.resized
        return left / width, top / height, (left + self._width) / width, (top + self._height) / height

    def pixels(self, image: Pixels) -> Pixels:
        """(height, width, 3) BGR uint8 of any size → what the net sees of it, (height, width, channels) uint8.

        A view where it is the middle of something larger.
        """
        if self._grey:
            image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).astype(np.uint8, copy=False)
        resized = np.atleast_3d(cv2.resize(image, self.resized, interpolation=cv2.INTER_LINEAR))
        left, top = (self.resized[0] - self._width) // 2, (self.resized[1] - self._height) // 2
        return resized[top : top + self._height, left : left + self._width].astype(np.uint8, copy=False)

    def __call__(self, pixels: Pixels) -> Planes:
        """(height, width, 3) BGR uint8 of any size → (channels, height, width) float32, contiguous."""
        return self.arithmetic(self.pixels(pixels))


def transformer(cfg: Mapping[str, Any], shape: tuple[int, int, int]) -> Transformer:
    """The transformer that a release's ``custom_values`` and ``mean.binaryproto`` describe. Raises StartError."""
    values = Options("custom_values", cfg["custom_values"])
    mean_file = cfg["tar_files"].get("mean.binaryproto")
    mean_values = values.numbers("mean_values")
    if mean_file and mean_values:
        raise StartError("the release has both mean.binaryproto and custom_values.mean_values; it may have one")
    mean = None
    if mean_file:
        mean = centre_crop(read_mean(Path(mean_file)), shape)
    elif mean_values:
        if len(mean_values) not in (1, shape[0]):
            raise StartError(f"custom_values.mean_values has {len(mean_values)} values, should be 1 or {shape[0]}")
        mean = np.array(mean_values, np.float32).reshape(-1, 1, 1)
    swap = values.numbers("channel_swap")
    if swap is not None and sorted(swap) != [0, 1, 2]:
        raise StartError(f"custom_values.channel_swap is {swap}, should be an order of 0, 1, 2")
    return Transformer(
        shape,
        image_width=cfg["image_width"],
        raw_scale=values.number("raw_scale", 1.0),
        channel_swap=None if swap is None else tuple(int(index) for index in swap),
        mean=mean,
        input_scale=values.number("input_scale", 1.0),
    )


def read_mean(path: Path) -> Planes:
    """A ``mean.binaryproto`` as (channels, height, width) float32. Raises StartError."""
    try:
        mean = read_blob(path)
    except ConversionError as error:
        raise StartError(str(error)) from error
    if mean.ndim == 4 and mean.shape[0] == 1:
        mean = mean[0]
    if mean.ndim != 3:
        raise StartError(f"mean.binaryproto has the shape {mean.shape}, should be (1, channels, height, width)")
    return mean


def centre_crop(mean: Planes, shape: tuple[int, int, int]) -> Planes:
    """The middle of a mean image that is larger than the net's input, as Caffe crops it. Raises StartError."""
    channels, height, width = shape
    if mean.shape[0] != channels or mean.shape[1] < height or mean.shape[2] < width:
        raise StartError(f"mean.binaryproto is {mean.shape}, which does not cover the net's input {shape}")
    top, left = (mean.shape[1] - height) // 2, (mean.shape[2] - width) // 2
    return mean[:, top : top + height, left : left + width]
