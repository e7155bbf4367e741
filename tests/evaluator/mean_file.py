"""Write mean files as Caffe does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluator.caffe.caffe_pb2 import BlobProto


def write_mean(path: Path, mean: NDArray[np.float32], *, legacy: bool) -> Path:
    """Write a mean, (channels, height, width), with the old fields of its shape if ``legacy``. Return its path."""
    blob = BlobProto(data=mean.ravel().tolist())
    if legacy:
        blob.num, blob.channels, blob.height, blob.width = 1, *mean.shape
    else:
        blob.shape.dim.extend(mean.shape)
    path.write_bytes(blob.SerializeToString())
    return path
