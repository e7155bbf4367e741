"""Converts the net of a release to ONNX.

Only the process that converts imports this module: with onnx and the converter it takes much memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from atserving.errors import StartError
from evaluator.caffe import ConversionError, convert
from evaluator.net_config import NetConfig
from evaluator.runtime import gpu, input_graph, preprocessing
from evaluator.runtime.device import Device

_PROTOTXT = "deploy.prototxt"
_CAFFEMODEL = "weight.caffemodel"


def of_release(config: NetConfig, device: Device, outputs: Sequence[str] = ()) -> onnx.ModelProto:
    """Convert the net of a release. ``outputs`` names inner blobs to have as outputs too. Raises StartError.

    Its inputs and outputs are float32, also if ``device`` computes in float16.
    """
    for name in (_PROTOTXT, _CAFFEMODEL):
        if name not in config.tar_files:
            raise StartError(f"the release's tar has no {name}")
    model = of_files(config.tar_files[_PROTOTXT], config.tar_files[_CAFFEMODEL], outputs)
    return gpu.halved(model) if device.halves_graph else model


def of_files(prototxt: str | Path, caffemodel: str | Path, outputs: Sequence[str] = ()) -> onnx.ModelProto:
    """Convert a net. Raises StartError."""
    try:
        return convert(Path(prototxt), Path(caffemodel), outputs=outputs)
    except ConversionError as error:
        raise StartError(f"the net can't be converted: {error}") from error


def for_pixels(config: NetConfig, device: Device, outputs: Sequence[str], name: str) -> onnx.ModelProto:
    """Convert the net of a release into one that takes pixels, (n, height, width, channels) uint8.

    ``name`` is the built-in net's. Raises StartError, also if the net has other inputs than one image.
    """
    model = of_release(config, device, outputs)
    transformer = preprocessing.transformer(config, _image_shape(model, name))
    input_graph.prepend(model, transformer.arithmetic, on_cpu=device.is_cpu)
    return model


def _image_shape(model: onnx.ModelProto, name: str) -> tuple[int, int, int]:
    """Return (channels, height, width) of the only input. Raises StartError."""
    inputs = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.input}
    sizes = next(iter(inputs.values()), [])[1:]
    if len(inputs) != 1 or len(sizes) != 3 or 0 in sizes:
        raise StartError(f"{name} takes nets with one image input of a fixed size; this one has {list(inputs)}")
    channels, height, width = sizes
    return channels, height, width
