"""The transformer makes a net's input from pixels, in Caffe's order."""

import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from atserving.errors import StartError
from evaluator.net_config import NetConfig
from evaluator.options import Options
from evaluator.runtime.preprocessing import read_mean, transformer
from tests.evaluator.mean_file import write_mean

SHAPE = (3, 6, 8)


def release(image_width: int | None = None, mean: Path | None = None, **custom_values: Any) -> NetConfig:
    files = {} if mean is None else {"mean.binaryproto": mean}
    return NetConfig(files, custom_values=Options("custom_values", custom_values), image_width=image_width)


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (20, 30, 3), np.uint8)


@pytest.fixture
def planes(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the input of a net whose release has no scaling."""
    return cv2.resize(pixels, (8, 6), interpolation=cv2.INTER_LINEAR).transpose(2, 0, 1).astype(np.float32)


def test_pixels_are_only_resized_by_default(pixels: NDArray[np.uint8], planes: NDArray[np.float32]) -> None:
    result = transformer(release(), SHAPE)(pixels)
    assert result.dtype == np.float32
    assert result.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(result, planes)


def test_steps_are_applied_in_caffes_order(pixels: NDArray[np.uint8], planes: NDArray[np.float32]) -> None:
    values: dict[str, Any] = {
        "raw_scale": 1 / 255,
        "channel_swap": [2, 1, 0],
        "mean_values": [0.1, 0.2, 0.3],
        "input_scale": 4,
    }
    expected = planes / 255
    expected = expected[[2, 1, 0]]
    expected = (expected - np.array([0.1, 0.2, 0.3]).reshape(3, 1, 1)) * 4
    np.testing.assert_allclose(transformer(release(**values), SHAPE)(pixels), expected, rtol=1e-5, atol=1e-5)


def test_mean_image_has_the_channel_order_of_the_net(
    tmp_path: Path, pixels: NDArray[np.uint8], planes: NDArray[np.float32]
) -> None:
    mean = np.random.default_rng(5).random((3, 8, 10), np.float32)
    path = write_mean(tmp_path / "mean.binaryproto", mean, legacy=True)
    values: dict[str, Any] = {"raw_scale": 2, "channel_swap": [2, 1, 0], "input_scale": 0.5}
    expected = (planes[[2, 1, 0]] * 2 - mean[:, 1:7, 1:9]) * 0.5
    result = transformer(release(mean=path, **values), SHAPE)(pixels)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)


def test_single_mean_value_applies_to_all_channels(pixels: NDArray[np.uint8], planes: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(transformer(release(mean_values=100), SHAPE)(pixels), planes - 100)


@pytest.mark.parametrize("legacy", [True, False])
def test_larger_mean_image_is_cropped_to_its_centre(
    legacy: bool, tmp_path: Path, pixels: NDArray[np.uint8], planes: NDArray[np.float32]
) -> None:
    mean = np.random.default_rng(4).random((3, 10, 13), np.float32)
    path = write_mean(tmp_path / "mean.binaryproto", mean, legacy=legacy)
    result = transformer(release(mean=path), SHAPE)(pixels)
    np.testing.assert_array_equal(result, planes - mean[:, 2:8, 2:10])


def test_image_width_resizes_wider_and_crops_the_centre(pixels: NDArray[np.uint8]) -> None:
    wide = cv2.resize(pixels, (16, 12), interpolation=cv2.INTER_LINEAR).transpose(2, 0, 1)
    np.testing.assert_array_equal(transformer(release(image_width=16), SHAPE)(pixels), wide[:, 3:9, 4:12])


def test_net_of_one_channel_gets_a_grey_image(pixels: NDArray[np.uint8]) -> None:
    grey = cv2.resize(cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY), (8, 6), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(transformer(release(), (1, 6, 8))(pixels), grey[np.newaxis])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"raw_scale": "1"}, "custom_values.raw_scale is '1', should be a finite number"),
        ({"input_scale": float("nan")}, "custom_values.input_scale is nan"),
        ({"mean_values": [1, 2]}, "custom_values.mean_values has 2 values, should be 1 or 3"),
        ({"mean_values": [1, True, 2]}, "custom_values.mean_values is"),
        ({"channel_swap": [0, 1]}, "custom_values.channel_swap is"),
        ({"image_width": 4}, "image_width is 4, less than the net's input, 8"),
    ],
)
def test_wrong_custom_values_fail_to_load(values: dict[str, Any], message: str) -> None:
    with pytest.raises(StartError) as error:
        transformer(release(**values), SHAPE)
    assert message in str(error.value)


def test_net_without_an_image_input_fails_to_load() -> None:
    with pytest.raises(StartError, match="the net's input has 4 channels"):
        transformer(release(), (4, 6, 8))


@pytest.mark.parametrize("shape", [(3, 5, 8), (3, 6, 7), (1, 6, 8)])
def test_mean_image_that_does_not_cover_the_input_fails_to_load(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = write_mean(tmp_path / "mean.binaryproto", np.zeros(shape, np.float32), legacy=True)
    with pytest.raises(StartError, match="does not cover the net's input"):
        transformer(release(mean=path), SHAPE)


@pytest.mark.parametrize("data", [b"", b"\xff\xff\xff", b"no mean at all"])
def test_broken_mean_file_fails_to_load(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mean.binaryproto"
    path.write_bytes(data)
    with pytest.raises(StartError, match=r"mean\.binaryproto"):
        transformer(release(mean=path), SHAPE)


def test_truncated_mean_file_fails_to_load(tmp_path: Path) -> None:
    path = write_mean(tmp_path / "mean.binaryproto", np.zeros(SHAPE, np.float32), legacy=True)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(StartError, match=r"mean\.binaryproto: is not a BlobProto"):
        transformer(release(mean=path), SHAPE)


@given(data=st.binary(max_size=300))
def test_random_bytes_give_a_mean_or_a_start_error(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mean.binaryproto"
        path.write_bytes(data)
        try:
            assert read_mean(path).ndim == 3
        except StartError as error:
            assert "mean.binaryproto" in str(error)


def test_mean_file_and_mean_values_together_fail_to_load(tmp_path: Path) -> None:
    path = write_mean(tmp_path / "mean.binaryproto", np.zeros(SHAPE, np.float32), legacy=True)
    with pytest.raises(StartError, match="both"):
        transformer(release(mean=path, mean_values=1), SHAPE)
