"""A JPEG made in code, with the decoding cost of a photograph."""

from __future__ import annotations

import cv2
import numpy as np


def jpeg(width: int = 640, height: int = 480, seed: int = 0) -> bytes:
    """Return a colour JPEG of noise at every scale. Like in a photograph, finer noise has less contrast."""
    random = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    cell = max(width, height)
    while cell >= 2:
        grid = random.normal(0, 1, (height // cell + 2, width // cell + 2, 3))
        pixels += (
            20 * (cell / max(width, height)) ** 0.35 * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        )
        cell //= 2
    return cv2.imencode(".jpg", np.clip(pixels, 0, 255).astype(np.uint8))[1].tobytes()
