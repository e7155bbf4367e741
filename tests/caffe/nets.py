"""Nets to convert: written from a prototxt's text, with weights given or drawn from a seed, and run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from evaluator.caffe import convert
from evaluator.caffe.convert import build
from evaluator.caffe.net_plan import plan_net
from evaluator.caffe.prototxt import parse_net
from examples import caffe_files
from examples.caffe_files import delimited as delimited
from examples.caffe_files import varint as varint

Array = NDArray[Any]
FIXTURES = Path(__file__).parent / "fixtures"
MODELS = Path(__file__).parents[3] / "shared" / "models"


def input_layer(*dims: int, name: str = "data") -> str:
    sizes = " ".join(f"dim: {dim}" for dim in dims)
    return f'layer {{ name: "{name}" type: "Input" top: "{name}" input_param {{ shape {{ {sizes} }} }} }}\n'


def layer(kind: str, bottoms: str = "data", tops: str = "out", more: str = "", name: str | None = None) -> str:
    """A layer's prototxt; bottoms and tops are separated by blanks."""
    blobs = [f'bottom: "{blob}"' for blob in bottoms.split()] + [f'top: "{blob}"' for blob in tops.split()]
    return f'layer {{ name: "{name or "the_" + kind}" type: "{kind}" {" ".join(blobs)} {more} }}\n'


def caffemodel(weights: Mapping[str, Sequence[Array]]) -> bytes:
    """A caffemodel without the types of its layers, which nothing reads."""
    return caffe_files.caffemodel("", [(name, "", blobs) for name, blobs in weights.items()])


class DrawnBlobs:
    """Weights for whatever the layers ask for, of a size that keeps deep nets' activations in range."""

    def __init__(self, types: Mapping[str, str], seed: int = 0) -> None:
        self.drawn: dict[str, list[Array]] = {}
        self._types = types
        self._random = np.random.default_rng(seed)

    def count(self, layer: str) -> int:
        return 2

    def take(self, layer: str, index: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        blobs = self.drawn.setdefault(layer, [])
        while len(blobs) <= index:
            blobs.append(np.empty(0))
        blobs[index] = self._draw(self._types[layer], index, shape).astype(np.float32)
        return blobs[index]

    def _draw(self, kind: str, index: int, shape: tuple[int, ...]) -> Array:
        if kind == "BatchNorm" and index == 2:
            return np.array([2.0])
        if (kind == "BatchNorm" and index == 1) or (kind in ("Scale", "BN") and index == 0):
            return self._random.uniform(0.5, 1.5, shape)
        if kind == "PReLU":
            return self._random.uniform(0.1, 0.4, shape)
        if kind == "Normalize":
            return self._random.uniform(5, 20, shape)
        if index > 0 or len(shape) < 2:
            return self._random.normal(0, 0.1, shape)
        fan_in = np.prod(shape[1:]) if kind != "Deconvolution" else shape[0]
        return self._random.normal(0, np.sqrt(2 / fan_in), shape)


def draw_weights(prototxt: str, seed: int = 0) -> dict[str, list[Array]]:
    """Weights by layer name for every layer that has any."""
    net = parse_net(prototxt.encode(), "net")
    blobs = DrawnBlobs({spec.name: spec.type for spec in net.layers}, seed)
    build(net, plan_net(net, "net"), blobs, file="net")
    return blobs.drawn


def write_net(folder: Path, prototxt: str, weights: Mapping[str, Sequence[Array]] | None = None) -> tuple[Path, Path]:
    """Files for `convert`; without weights they are drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "deploy.prototxt", folder / "weight.caffemodel"
    paths[0].write_text(prototxt)
    paths[1].write_bytes(caffemodel(draw_weights(prototxt) if weights is None else weights))
    return paths


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto | onnxruntime.InferenceSession, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs by name."""
    engine = model if isinstance(model, onnxruntime.InferenceSession) else session(model)
    names = [output.name for output in engine.get_outputs()]
    return dict(zip(names, engine.run(None, dict(feeds)), strict=True))


def answer(folder: Path, prototxt: str, weights: Mapping[str, Sequence[Array]] | None = None, /, **feeds: Array) -> Any:
    """The only output of a net, converted and run. A feed of the blob `data` is given as data=..."""
    outputs = run(
        convert(*write_net(folder, prototxt, weights)), {k: np.asarray(v, np.float32) for k, v in feeds.items()}
    )
    (output,) = outputs.values()
    return output


def error(actual: Array, expected: Array) -> float:
    """The largest difference relative to the largest expected value; infinite where the shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    if expected.size == 0:
        return 0.0
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30))


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)
