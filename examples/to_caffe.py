"""Write a trained PyTorch net as a Caffe release, and read the release back with the converter and OpenCV."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from string import Template

import cv2
import numpy as np
import onnxruntime
import torch  # type: ignore[import-not-found,unused-ignore]
from torch import nn  # type: ignore[import-not-found,unused-ignore]

from evaluator.caffe import convert
from examples.caffe_files import Array, binaryproto, caffemodel
from examples.scenes import LABELS, Image

# Training multiplies (pixel - mean) by this factor; `fold_input_scale` moves it into the first weights.
INPUT_SCALE = 1 / 64


def caffe_layers(net: nn.Module) -> list[tuple[str, str, list[Array]]]:
    """Return name, type and blobs of each layer with weights.

    A BatchNorm2d `x` becomes a BatchNorm `x` and a Scale `x_scale`.
    """
    layers = []
    for name, module in net.named_modules():
        values = {key: value.numpy() for key, value in module.state_dict().items()}
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            kind = "Convolution" if isinstance(module, nn.Conv2d) else "Deconvolution"
            layers.append((name, kind, [values[key] for key in ("weight", "bias") if key in values]))
        elif isinstance(module, nn.BatchNorm2d):
            statistics = [values["running_mean"], values["running_var"], np.ones(1, np.float32)]
            layers.append((name, "BatchNorm", statistics))
            layers.append((f"{name}_scale", "Scale", [values["weight"], values["bias"]]))
    return layers


def fold_input_scale(first: nn.Module) -> None:
    """Scale the first weights so that a net trained on scaled inputs takes pixels less the mean."""
    first.state_dict()["weight"].mul_(INPUT_SCALE)


def release_files(name: str, prototxt: Path, net: nn.Module, mean: Array, size: int) -> dict[str, bytes]:
    """Return the members of a release's tar. The mean is one number a channel."""
    return {
        "deploy.prototxt": prototxt.read_bytes(),
        "labels.csv": "".join(f"{index},{label}\n" for index, label in enumerate(LABELS)).encode(),
        "mean.binaryproto": binaryproto(np.tile(mean[:, None, None], (1, size, size))),
        "weight.caffemodel": caffemodel(name, caffe_layers(net)),
    }


def channel_mean(images: Iterable[Image]) -> Array:
    return np.asarray(np.mean([image.mean(axis=(0, 1)) for image in images], axis=0), np.float32)


def planes(images: Sequence[Image], mean: Array) -> Array:
    """Turn images of the net's size into its input: (n, 3, height, width), BGR less the mean."""
    stacked = np.stack(images).transpose(0, 3, 1, 2).astype(np.float32)
    return np.ascontiguousarray(stacked - mean[:, None, None])


def torch_outputs(net: nn.Module, inputs: Array) -> list[Array]:
    with torch.inference_mode():
        outputs = net(torch.from_numpy(inputs))
    return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


@contextmanager
def _written(files: dict[str, bytes]) -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        prototxt, weights = Path(folder, "deploy.prototxt"), Path(folder, "weight.caffemodel")
        prototxt.write_bytes(files[prototxt.name])
        weights.write_bytes(files[weights.name])
        yield prototxt, weights


def open_onnx(files: dict[str, bytes], outputs: Sequence[str] = ()) -> onnxruntime.InferenceSession:
    """Load the written files with the server's converter."""
    with _written(files) as (prototxt, weights):
        model = convert(prototxt, weights, outputs=outputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def open_opencv(files: dict[str, bytes]) -> cv2.dnn.Net:
    """Load the written files with OpenCV's Caffe reader."""
    with _written(files) as (prototxt, weights):
        return cv2.dnn.readNetFromCaffe(str(prototxt), str(weights))


def at_most(value: float) -> str:
    """Format a small difference for a page, rounded up."""
    return f"{np.ceil(value * 1e6) / 1e6:.6f}"


def write_page(folder: Path, values: dict[str, object]) -> None:
    """Write README.md from README.template.md."""
    template = Template((folder / "README.template.md").read_text())
    (folder / "README.md").write_text(template.substitute(values))
