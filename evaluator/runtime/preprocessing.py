"""Makes a net's input from decoded pixels, in Caffe's order: resize, raw_scale, channel swap, mean, input_scale."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from atserving.errors import StartError
from evaluator.images import Pixels
from evaluator.net_config import NetConfig

Planes = NDArray[np.float32]


@dataclass(frozen=True)
class Arithmetic:
    """The steps after resizing: (x * raw_scale - mean) * input_scale, with the constants multiplied out.

    ``order`` lists the pixel channels in the net's order; None keeps their order. ``shift`` broadcasts to (channels,
    height, width), in the net's order; None is 0.
    """

    scale: np.float32
    order: tuple[int, ...] | None
    shift: Planes | None

    def __call__(self, pixels: Pixels) -> Planes:
        """Convert (height, width, channels) uint8 to (channels, height, width) float32, contiguous."""
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


class Geometry:
    """Makes the pixels for a net of shape (n, channels, height, width), with 3 channels (BGR) or 1 (grey)."""

    def __init__(self, shape: tuple[int, int, int], image_width: int | None = None) -> None:
        """``shape`` is (channels, height, width). Raises StartError if no image can have it."""
        channels, self._height, self._width = shape
        if channels not in (1, 3):
            raise StartError(f"the net's input has {channels} channels, an image has 3 or, grey, 1")
        self._grey = channels == 1
        self.resized = self._resize_to(image_width)
        """The width and height of a resized image; the net sees its centre."""

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
        """Resize, crop and convert (height, width, 3) BGR uint8 of any size to (height, width, channels) uint8.

        The result may be a view of a larger array.
        """
        if self._grey:
            image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).astype(np.uint8, copy=False)
        resized = np.atleast_3d(cv2.resize(image, self.resized, interpolation=cv2.INTER_LINEAR))
        left, top = (self.resized[0] - self._width) // 2, (self.resized[1] - self._height) // 2
        return resized[top : top + self._height, left : left + self._width].astype(np.uint8, copy=False)


class Transformer(Geometry):
    """Makes inputs for a net in two steps: ``pixels`` as above, then ``arithmetic``."""

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
        """``shape`` is (channels, height, width); ``mean`` broadcasts to it, in the net's order of channels.

        Raises StartError if these don't fit each other.
        """
        super().__init__(shape, image_width)
        self.arithmetic = Arithmetic(
            np.float32(raw_scale * input_scale),
            None if self._grey else channel_swap,
            None if mean is None else mean * np.float32(input_scale),
        )

    def __call__(self, pixels: Pixels) -> Planes:
        """Convert (height, width, 3) BGR uint8 of any size to (channels, height, width) float32, contiguous."""
        return self.arithmetic(self.pixels(pixels))


def transformer(config: NetConfig, shape: tuple[int, int, int]) -> Transformer:
    """Return the transformer of a release, from its ``custom_values`` and ``mean.binaryproto``. Raises StartError."""
    options = config.custom_values
    mean_file = config.tar_files.get("mean.binaryproto")
    mean_values = options.numbers("mean_values")
    if mean_file and mean_values:
        raise StartError("the release has both mean.binaryproto and custom_values.mean_values; it may have one")
    mean = None
    if mean_file:
        mean = centre_crop(read_mean(mean_file), shape)
    elif mean_values:
        if len(mean_values) not in (1, shape[0]):
            raise StartError(f"custom_values.mean_values has {len(mean_values)} values, should be 1 or {shape[0]}")
        mean = np.array(mean_values, np.float32).reshape(-1, 1, 1)
    swap = options.numbers("channel_swap")
    if swap is not None and sorted(swap) != [0, 1, 2]:
        raise StartError(f"custom_values.channel_swap is {swap}, should be an order of 0, 1, 2")
    return Transformer(
        shape,
        image_width=config.image_width,
        raw_scale=options.number("raw_scale", 1.0),
        channel_swap=None if swap is None else tuple(int(index) for index in swap),
        mean=mean,
        input_scale=options.number("input_scale", 1.0),
    )


def read_mean(path: Path) -> Planes:
    """Read a ``mean.binaryproto`` as (channels, height, width) float32. Raises StartError."""
    # A process that only runs nets does without the converter.
    from evaluator.caffe import ConversionError
    from evaluator.caffe.caffemodel import read_blob

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
    """Crop a mean image to the centre of the net's size, as Caffe does. Raises StartError."""
    channels, height, width = shape
    if mean.shape[0] != channels or mean.shape[1] < height or mean.shape[2] < width:
        raise StartError(f"mean.binaryproto is {mean.shape}, which does not cover the net's input {shape}")
    top, left = (mean.shape[1] - height) // 2, (mean.shape[2] - width) // 2
    return mean[:, top : top + height, left : left + width]
