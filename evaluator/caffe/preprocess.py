"""What Caffe does to an image before the net: its Transformer's steps, in its order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .caffemodel import read_blob
from .errors import ConversionError

Float32 = NDArray[np.float32]


def read_mean(path: str | PathLike[str]) -> Float32:
    """The mean image of a `mean.binaryproto`.

    Returns:
        float32 (C, H, W), for colour nets in BGR.

    Raises:
        ConversionError: the file cannot be read, is no BlobProto, or holds no image.
    """
    mean = read_blob(Path(path))
    while mean.ndim > 3 and mean.shape[0] == 1:
        mean = mean[0]
    if mean.ndim != 3:
        raise ConversionError(f"has the shape {list(mean.shape)}, which is no image", file=Path(path).name)
    return mean


def crop_mean(mean: Float32, height: int, width: int) -> Float32:
    """The middle (C, height, width) of a mean image, which Caffe makes of images larger than the net's input.

    Raises:
        ConversionError: the mean is smaller than that.
    """
    top, left = (mean.shape[1] - height) // 2, (mean.shape[2] - width) // 2
    if top < 0 or left < 0:
        raise ConversionError(f"the mean image is {list(mean.shape[1:])}, smaller than the input {[height, width]}")
    return mean[:, top : top + height, left : left + width]


@dataclass(frozen=True)
class Preprocess:
    """Caffe's steps from an image to an input, in its order: raw_scale, channel swap, mean, input_scale.

    Attributes:
        raw_scale: the image is multiplied with it first; 255 where it comes as 0 to 1.
        channel_swap: which channel of the image goes where, (2, 1, 0) to make BGR of RGB; None leaves them.
        mean: subtracted next, one number a channel or (C, H, W); already in the net's order of channels.
        input_scale: the result is multiplied with it last.
    """

    raw_scale: float = 1.0
    channel_swap: Sequence[int] | None = None
    mean: Float32 | None = None
    input_scale: float = 1.0

    def __call__(self, image: NDArray[np.generic]) -> Float32:
        """The input (C, H, W), float32, of an image (H, W, C) or (H, W), of any numeric type.

        Raises:
            ConversionError: the image does not fit the mean or the channels to swap.
        """
        pixels = np.asarray(image, np.float32)
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if pixels.ndim != 3:
            raise ConversionError(f"an image has the shape {list(pixels.shape)}, not (H, W, C)")
        planes = pixels.transpose(2, 0, 1) * np.float32(self.raw_scale)
        if self.channel_swap is not None:
            if sorted(self.channel_swap) != list(range(len(planes))):
                raise ConversionError(f"channel_swap is {list(self.channel_swap)} for {len(planes)} channels")
            planes = planes[list(self.channel_swap)]
        if self.mean is not None:
            planes = planes - self._mean_over(planes)
        return np.ascontiguousarray(planes * np.float32(self.input_scale))

    def _mean_over(self, planes: Float32) -> Float32:
        assert self.mean is not None
        mean = np.asarray(self.mean, np.float32)
        if mean.ndim < 3:
            if mean.size not in (1, len(planes)):
                raise ConversionError(f"the mean has {mean.size} numbers for {len(planes)} channels")
            return mean.reshape(-1, 1, 1)
        if len(mean) not in (1, len(planes)):
            raise ConversionError(f"the mean has {len(mean)} channels, the image {len(planes)}")
        return crop_mean(mean, *planes.shape[1:])
