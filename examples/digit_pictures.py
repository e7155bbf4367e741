"""The handwritten digits behind all examples: scikit-learn's `load_digits`, one fifth held out."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits  # type: ignore[import-not-found,import-untyped,unused-ignore]
from sklearn.model_selection import train_test_split  # type: ignore[import-not-found,import-untyped,unused-ignore]

Pictures = NDArray[np.uint8]  # (n, height, width), grey
Labels = NDArray[np.int64]

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PICTURE_SIZE = 64  # height and width of an enlarged digit
SEED = 8


@dataclass(frozen=True)
class Split:
    train: Pictures
    train_labels: Labels
    test: Pictures
    test_labels: Labels


def load_split() -> Split:
    """Load 64x64 pictures, light digits on dark, split 80:20 with the same share of each digit in both parts."""
    digits = load_digits()
    small = np.round(digits.images * 255 / 16).astype(np.uint8)
    size = (PICTURE_SIZE, PICTURE_SIZE)
    pictures = np.stack([cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC) for picture in small])
    labels = digits.target.astype(np.int64)
    train, test, train_labels, test_labels = train_test_split(
        pictures, labels, test_size=0.2, random_state=SEED, stratify=labels
    )
    return Split(train, train_labels, test, test_labels)
