"""Whole nets for the converter's tests and its accuracy page: our examples, layouts, and published networks."""

from __future__ import annotations

import tarfile
from pathlib import Path

import cv2
import numpy as np

from bench.nets import CaffeNet
from evaluator.caffe import convert
from evaluator.caffe.caffe_pb2 import BlobProto

from .nets import normal, session

ROOT = Path(__file__).parents[2]

# Our trained nets, and an image for each.
EXAMPLES = {
    "digits/digits-v1": "digits/images/7.png",
    "digits/digits-v2": "digits/images/3.png",
    "detect/digits-detect-v1": "detect/images/1.png",
    "segment/digits-segment-v1": "segment/images/2.png",
}

NETWORKS = (
    "cifar10_quick",
    "lenet_mnist",
    "mtcnn_det1",
    "mtcnn_det2",
    "retinaface_mnet25",
    "ultraface_rfb320",
    "yoloface_500k",
    "yuface_ssd_v1",
)

# Blobs inside a net, compared because random weights leave its softmax at 0 and 1; and a smaller image where the
# original would take long.
STRUCTURES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "enet_deploy_final": ((), {"dim: 512": "dim: 64", "dim: 1024": "dim: 96"}),
    "mobilenet_ssd_voc_deploy": (("mbox_loc", "mbox_conf_flatten"), {}),
    "squeezenet_v1.1": (("pool10",), {}),
    "yolov5s": ((), {"dim: 640": "dim: 160", "dim: 80": "dim: 20", "dim: 40": "dim: 10", "dim: 20": "dim: 5"}),
}


def smaller(prototxt: str, replacements: dict[str, str]) -> str:
    """Replace sizes in a prototxt, all at once: no replacement applies to the result of another."""
    for i, old in enumerate(replacements):
        prototxt = prototxt.replace(f"{old}\n", f"@{i}\n")
    for i, new in enumerate(replacements.values()):
        prototxt = prototxt.replace(f"@{i}\n", f"{new}\n")
    return prototxt


def layout_image(net: CaffeNet, shape: list[int], seed: int = 0) -> np.ndarray:
    # The nets of the benchmark take pixels.
    return normal(1, *shape, seed=seed) * (60 if net.name in ("mobilenet_v1", "resnet_50") else 1)


def example(name: str, folder: Path) -> tuple[tuple[Path, Path], np.ndarray]:
    """Return the files of an example's net and one of its images as the net's input."""
    with tarfile.open(ROOT / "examples" / f"{name}.tar") as tar:
        tar.extractall(folder, filter="data")
    paths = folder / "deploy.prototxt", folder / "weight.caffemodel"
    size = session(convert(*paths)).get_inputs()[0].shape[2:]
    image = cv2.imread(str(ROOT / "examples" / EXAMPLES[name]))
    assert image is not None
    mean = BlobProto.FromString((folder / "mean.binaryproto").read_bytes())
    planes = cv2.resize(image, size[::-1]).transpose(2, 0, 1) - np.reshape(mean.data, (3, *size))
    return paths, planes[np.newaxis].astype(np.float32)
