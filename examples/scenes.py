"""Canvases with handwritten digits scattered on them, and the truth about each: boxes, labels, a mask."""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from examples.caffe_files import Array
from examples.digit_pictures import NAMES, PICTURE_SIZE, Labels, Pictures

Image = NDArray[np.uint8]  # (height, width, 3), BGR
Mask = NDArray[np.uint8]  # (height, width), labels

# A digit's label is the digit plus one.
LABELS = ("background", *NAMES)
INK = 110  # a pixel at least this light belongs to the digit
GAP = 3  # pixels between the boxes of two digits
ATTEMPTS = 20  # random places tried before a digit is left out


@dataclass(frozen=True)
class Scene:
    """An image and its truth: boxes (n, 4) as x1, y1, x2, y2 in pixels, their labels (n,), and every pixel's label."""

    image: Image
    boxes: Array
    labels: Labels
    mask: Mask


@dataclass(frozen=True)
class Recipe:
    """Limits for drawing scenes. Digits' heights are fractions of a scene's smaller side."""

    smallest: float
    largest: float
    most_digits: int


def draw(recipe: Recipe, pictures: Pictures, digits: Labels, size: tuple[int, int], rng: np.random.Generator) -> Scene:
    """Return a scene of the given (width, height) with digits chosen at random from the pictures."""
    width, height = size
    image = _ground(width, height, rng)
    mask = np.zeros((height, width), np.uint8)
    boxes: list[tuple[int, int, int, int]] = []
    labels = []
    for _ in range(rng.integers(1, recipe.most_digits + 1)):
        chosen = int(rng.integers(len(pictures)))
        tall = rng.uniform(recipe.smallest, recipe.largest) * min(width, height)
        ink = _ink(pictures[chosen], tall, rng)
        place = _free_place(ink.shape, (height, width), boxes, rng)
        if place is None:
            continue
        top, left = place
        bottom, right = top + ink.shape[0], left + ink.shape[1]
        _paint(image[top:bottom, left:right], ink, rng)
        label = int(digits[chosen]) + 1
        mask[top:bottom, left:right][ink >= 0.5] = label
        boxes.append((left, top, right, bottom))
        labels.append(label)
    noisy = image + rng.normal(0, rng.uniform(0, 6), size=image.shape)
    return Scene(
        np.clip(noisy, 0, 255).astype(np.uint8),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        mask,
    )


def resize(scene: Scene, size: int) -> Scene:
    """Resize a scene to a square input as the server does, and its truth with it."""
    height, width = scene.mask.shape
    scale = np.array([size / width, size / height] * 2, np.float32)
    image = cv2.resize(scene.image, (size, size), interpolation=cv2.INTER_LINEAR)
    mask = cv2.resize(scene.mask, (size, size), interpolation=cv2.INTER_NEAREST)
    return Scene(image.astype(np.uint8), scene.boxes * scale, scene.labels, mask.astype(np.uint8))


def any_size(rng: np.random.Generator) -> tuple[int, int]:
    """Return a random width and height from 112 to 256, with a ratio between 3:4 and 4:3."""
    width = int(rng.integers(128, 225))
    return width, int(np.clip(width * rng.uniform(0.75, 1.33), 112, 256))


def endless(recipe: Recipe, pictures: Pictures, digits: Labels, size: int, seed: int) -> Iterator[Scene]:
    """Yield scenes of many sizes, each resized to the input. The same seed gives the same scenes."""
    rng = np.random.default_rng(seed)
    while True:
        yield resize(draw(recipe, pictures, digits, any_size(rng), rng), size)


def png(pixels: NDArray[np.uint8]) -> bytes:
    return cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes()


def _ground(width: int, height: int, rng: np.random.Generator) -> Array:
    """Return a dark ground: blurred patches of similar colours, and a few faint strokes across."""
    colour = rng.uniform(15, 75, size=3)
    patches = colour + rng.normal(0, 14, size=(rng.integers(2, 7), rng.integers(2, 7), 3))
    ground = cv2.resize(patches.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(rng.integers(0, 5)):
        ends = rng.integers((-20, -20), (width + 20, height + 20), size=(2, 2)).tolist()
        shade = (colour + rng.uniform(-25, 30, size=3)).tolist()
        cv2.line(ground, ends[0], ends[1], shade, int(rng.integers(1, 6)), cv2.LINE_AA)
    return np.clip(ground, 0, 120).astype(np.float32)


def _ink(picture: NDArray[np.uint8], tall: float, rng: np.random.Generator) -> Array:
    """Return the ink, 0 to 1, on each pixel of a digit of that height, slightly turned and squeezed, no margins."""
    centre = (PICTURE_SIZE - 1) / 2
    turn = cv2.getRotationMatrix2D((centre, centre), rng.uniform(-12, 12), 0.8)
    turned = cv2.warpAffine(picture, turn, (PICTURE_SIZE, PICTURE_SIZE), flags=cv2.INTER_LINEAR)
    grey = _cut(turned.astype(np.float32))
    scale = tall / grey.shape[0]
    wide = max(4, round(grey.shape[1] * scale * rng.uniform(0.85, 1.15)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    sized = np.asarray(cv2.resize(grey, (wide, round(tall)), interpolation=method), np.float32)
    softness = 40 + 60 * min(scale, 1.0)
    return np.asarray(np.clip((_cut(sized) - INK) / softness + 0.5, 0, 1), np.float32)


def _cut(grey: Array) -> Array:
    rows, columns = np.nonzero(grey >= INK)
    return grey[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def _free_place(
    shape: tuple[int, ...], ground: tuple[int, int], boxes: list[tuple[int, int, int, int]], rng: np.random.Generator
) -> tuple[int, int] | None:
    """Return the (top, left) corner of a free place on the ground, or None."""
    tall, wide = shape
    if tall > ground[0] - 2 or wide > ground[1] - 2:
        return None
    for _ in range(ATTEMPTS):
        top = int(rng.integers(1, ground[0] - tall))
        left = int(rng.integers(1, ground[1] - wide))
        if all(
            left >= x2 + GAP or left + wide + GAP <= x1 or top >= y2 + GAP or top + tall + GAP <= y1
            for x1, y1, x2, y2 in boxes
        ):
            return top, left
    return None


def _paint(part: Array, ink: Array, rng: np.random.Generator) -> None:
    """Paint light ink of any colour, slightly fading from one side to the other."""
    colour = rng.uniform(130, 255, size=3)
    colour[rng.integers(3)] = rng.uniform(200, 255)
    fade = np.linspace(rng.uniform(0.8, 1), rng.uniform(0.8, 1), ink.shape[1])[None, :, None]
    alpha = ink[:, :, None]
    part[:] = part * (1 - alpha) + colour * fade * alpha
