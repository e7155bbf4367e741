"""The example app `digits`: its two release tars are well formed, and their nets name the sample images correctly."""

import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

FOLDER = Path(__file__).parent.parent / "examples" / "digits"
TARS = {version: FOLDER / f"digits-{version}.tar" for version in ("v1", "v2")}
IMAGES = sorted(path for path in (FOLDER / "images").iterdir() if path.suffix in {".png", ".jpg"})
MEMBERS = ["deploy.prototxt", "labels.csv", "mean.binaryproto", "weight.caffemodel"]
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SIZE = 28

Array = NDArray[np.float32]
versions = pytest.mark.parametrize("version", TARS)


def members(version: str) -> dict[str, bytes]:
    with tarfile.open(TARS[version], "r:") as tar:
        files = {info.name: tar.extractfile(info) for info in tar}
        return {name: file.read() for name, file in files.items() if file is not None}


def mean_image(binaryproto: bytes) -> Array:
    """Read a BlobProto of exactly the legacy form: four one-byte dims (fields 1..4), then packed floats (field 5)."""
    assert binaryproto[:8] == bytes([0x08, 1, 0x10, 3, 0x18, SIZE, 0x20, SIZE])
    assert binaryproto[8] == 0x2A
    length, start, shift = 0, 9, 0
    while True:
        byte = binaryproto[start]
        length |= (byte & 0x7F) << shift
        start, shift = start + 1, shift + 7
        if byte < 0x80:
            break
    assert start + length == len(binaryproto)
    return np.frombuffer(binaryproto, "<f4", offset=start).reshape(3, SIZE, SIZE).astype(np.float32)


def probabilities(version: str, image: Path, folder: Path) -> Array:
    """Return the net's probabilities for an image file: BGR, resized, less the mean, with the default scale of 1."""
    files = members(version)
    for name in ("deploy.prototxt", "weight.caffemodel"):
        (folder / name).write_bytes(files[name])
    net = cv2.dnn.readNetFromCaffe(str(folder / "deploy.prototxt"), str(folder / "weight.caffemodel"))
    picture = cv2.imread(str(image), cv2.IMREAD_COLOR)
    assert picture is not None
    resized = cv2.resize(picture, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    planes = resized.transpose(2, 0, 1).astype(np.float32) - mean_image(files["mean.binaryproto"])
    net.setInput(planes[np.newaxis], "data")
    answer: Array = np.asarray(net.forward("prob"), dtype=np.float32)[0]
    return answer


@versions
def test_tar_has_the_files_of_a_release_and_stays_small(version: str) -> None:
    assert sorted(members(version)) == MEMBERS
    assert TARS[version].stat().st_size < 1_000_000


@versions
def test_tar_depends_on_nothing_but_its_members(version: str) -> None:
    with tarfile.open(TARS[version], "r:") as tar:
        infos = tar.getmembers()
    assert [info.name for info in infos] == MEMBERS
    assert all(info.isreg() for info in infos)
    assert {(info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) for info in infos} == {
        (1541764800, 0, 0, "", "", 0o644)
    }


@versions
def test_labels_name_the_ten_digits_in_order(version: str) -> None:
    lines = members(version)["labels.csv"].decode().splitlines()
    assert lines == [f"{index},{name}" for index, name in enumerate(NAMES)]


@versions
def test_mean_has_the_input_size(version: str) -> None:
    mean = mean_image(members(version)["mean.binaryproto"])
    assert 20 < mean.mean() < 200
    assert mean.min() >= 0
    assert mean.max() <= 255


def test_samples_show_every_digit_and_have_both_formats() -> None:
    assert {path.stem for path in IMAGES} == {str(digit) for digit in range(10)}
    assert {path.suffix for path in IMAGES} == {".png", ".jpg"}


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_sample_exceeds_the_input_size(image: Path) -> None:
    picture = cv2.imread(str(image))
    assert picture is not None
    assert min(picture.shape[:2]) > SIZE


@versions
@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_net_names_the_digit_on_a_sample(version: str, image: Path, tmp_path: Path) -> None:
    answer = probabilities(version, image, tmp_path)
    assert answer.shape == (10,)
    assert answer.sum() == pytest.approx(1, abs=1e-5)
    assert answer.argmax() == int(image.stem)
    assert answer.max() > 0.5


def test_versions_give_different_answers(tmp_path: Path) -> None:
    assert members("v1")["deploy.prototxt"] != members("v2")["deploy.prototxt"]
    answers = [np.stack([probabilities(version, image, tmp_path) for image in IMAGES]) for version in TARS]
    assert np.abs(answers[0] - answers[1]).max() > 1e-3
