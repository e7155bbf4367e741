"""The nets of the benchmarks have the published sizes, and their activations stay in range."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from bench import photo
from bench.nets import CaffeNet, mobilenet_v1, resnet_50
from evaluator.caffe import convert, summarize
from tests.caffe.nets import run, session


@pytest.mark.parametrize(
    ("make", "parameters", "multiply_adds"),
    [
        # Published: 4.2 million parameters and 569 million multiply-adds; 25.6 million and 3.8 billion.
        (mobilenet_v1, 4_221_032, 568_740_352),
        (resnet_50, 25_530_472, 3_857_973_248),
    ],
)
def test_a_net_has_the_published_size_and_sees_its_image(
    make: Callable[[], CaffeNet], parameters: int, multiply_adds: int, tmp_path: Path
) -> None:
    model = convert(*make().write(tmp_path), outputs=["classifier"])
    summary = summarize(model)
    assert (summary.parameters, summary.multiply_adds) == (parameters, multiply_adds)
    pixels = cv2.imdecode(np.frombuffer(photo.jpeg(224, 224), np.uint8), cv2.IMREAD_COLOR)
    assert pixels is not None
    planes = pixels.transpose(2, 0, 1).astype(np.float32) - 117
    images = np.stack([planes, planes[..., ::-1]])
    scores = run(session(model), {"data": images})["classifier"].reshape(2, -1)
    # A softmax of such scores is neither flat nor 0 and 1.
    assert 0.3 < scores.std() < 5
    assert np.abs(scores[0] - scores[1]).max() > 1e-3 * np.abs(scores).max()


def test_a_seed_draws_the_same_weights_again() -> None:
    assert mobilenet_v1(1).files() == mobilenet_v1(1).files()
    assert mobilenet_v1(1).files() != mobilenet_v1(2).files()


def test_the_image_is_a_jpeg_of_the_size_asked_for() -> None:
    pixels = cv2.imdecode(np.frombuffer(photo.jpeg(640, 480), np.uint8), cv2.IMREAD_COLOR)
    assert pixels is not None
    assert pixels.shape == (480, 640, 3)
    assert photo.jpeg(640, 480) == photo.jpeg(640, 480)
    # A photograph's JPEG of this size has some 50 to 150 kB.
    assert 50_000 < len(photo.jpeg(640, 480)) < 150_000
