"""Make fixtures with real BVLC Caffe: `python make_fixture.py fixtures/<case> ...`.

Each folder must contain a deploy.prototxt. The program needs Python 3.9 with PyPI's kendryte-caffe==1.0.0.20210829,
protobuf<3.21 and numpy<1.24, so run it in an environment of its own.

It writes random weights to `weight.caffemodel`, and inputs and outputs to `expected.npz`: for a batch of one
(`b1|in|<blob>`, `b1|out|<blob>`) and for three images (`b3|...`). Caffe runs each of the three alone, because the
converter promises these results for a batch, even if Caffe itself would mix the images of a batch. A fixture named
declared<B>... has literal sizes for a batch of B, so it runs at that batch size only (`b<B>|...`). A fixture named
net_... is a small whole net.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from typing import Any

import caffe  # type: ignore[import-not-found]
import numpy as np

Arrays = dict[str, Any]


def draw(net: Any, random: np.random.RandomState, whole: bool) -> None:
    """Draw weights that make no layer's output constant or unbounded, in a ``whole`` net at any depth."""
    for layer in net.layers:
        for i, blob in enumerate(layer.blobs):
            if (layer.type == "BatchNorm" and i > 0) or (layer.type == "Scale" and i == 0):
                blob.data[...] = random.uniform(0.5, 1.5, blob.data.shape)
            elif whole and len(blob.data.shape) > 1:
                blob.data[...] = random.normal(0, (2 * blob.data.shape[0] / blob.data.size) ** 0.5, blob.data.shape)
            else:
                blob.data[...] = random.normal(0, 0.2 if whole else 0.5, blob.data.shape)


def run(net: Any, feeds: Arrays) -> Arrays:
    for name, array in feeds.items():
        net.blobs[name].reshape(*array.shape)
        net.blobs[name].data[...] = array
    net.reshape()
    net.forward()
    return {name: np.array(net.blobs[name].data) for name in net.outputs}


def at_declared_batch(net: Any, random: np.random.RandomState) -> Arrays:
    feeds = {name: random.normal(0, 1, net.blobs[name].data.shape).astype(np.float32) for name in net.inputs}
    outputs = run(net, feeds)
    batch = len(next(iter(feeds.values())))
    arrays: Arrays = {f"b1|in|{name}": array[:1] for name, array in feeds.items()}
    arrays.update({f"b{batch}|in|{name}": array for name, array in feeds.items()})
    arrays.update({f"b{batch}|out|{name}": array for name, array in outputs.items()})
    return arrays


def make(folder: Path) -> None:
    random = np.random.RandomState(zlib.crc32(folder.name.encode()))
    net = caffe.Net(str(folder / "deploy.prototxt"), caffe.TEST)
    draw(net, random, folder.name.startswith("net_"))
    net.save(str(folder / "weight.caffemodel"))
    if folder.name.startswith("declared"):
        np.savez_compressed(str(folder / "expected.npz"), **at_declared_batch(net, random))
        return
    arrays: Arrays = {}
    single = [
        {name: random.normal(0, 1, (1, *net.blobs[name].data.shape[1:])).astype(np.float32) for name in net.inputs}
        for _ in range(3)
    ]
    outputs = [run(net, feeds) for feeds in single]
    for key, feeds, results in (("b1", single[:1], outputs[:1]), ("b3", single, outputs)):
        for kind, parts in (("in", feeds), ("out", results)):
            for name in parts[0]:
                arrays[f"{key}|{kind}|{name}"] = np.concatenate([part[name] for part in parts])
    np.savez_compressed(str(folder / "expected.npz"), **arrays)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        make(Path(argument))
