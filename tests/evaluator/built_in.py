"""Built-in nets in this process, with nets made for a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from evaluator import nets
from evaluator.net_contract import Model, Ret
from tests.caffe.nets import write_net

Array = NDArray[Any]


def cfg(files: Mapping[str, Path], **fields: Any) -> dict[str, Any]:
    """As ``net_init`` gets it; what is no field of it is one of ``custom_values``."""
    given: dict[str, Any] = {"image_width": None, "batch_size": None, "use_device": "CPU"}
    known = {name: fields.pop(name) for name in given if name in fields}
    paths = {name: str(path) for name, path in files.items()}
    return {"tar_files": paths, "custom_files": {}, "custom_values": fields, "model_params": {}} | given | known


def files(
    folder: Path, prototxt: str, weights: Mapping[str, Sequence[Array]] | None = None, labels: str = ""
) -> dict[str, Path]:
    """A release's files; without weights they are drawn from a seed."""
    paths = {path.name: path for path in write_net(folder, prototxt, weights)}
    if labels:
        paths["labels.csv"] = folder / "labels.csv"
        paths["labels.csv"].write_text(labels)
    return paths


def loaded(net: str, config: dict[str, Any]) -> Model:
    model = nets.built_in(net).net_init(config)
    assert model["error"] == "", model["error"]
    return model


def evaluate(net: str, model: Model, *requests: tuple[Array, Any]) -> list[Ret]:
    """The rets of a batch of images, (height, width, 3) BGR, each with its params."""
    functions = nets.built_in(net)
    assert functions.net_preprocess
    reqs = [
        functions.net_preprocess(model, {"data": {"uri": "", "body": png(image)}, "params": params})
        for image, params in requests
    ]
    return functions.net_inference(model, {"reqid": "r", "reqs": reqs})


def png(image: Array) -> bytes:
    return cv2.imencode(".png", image.astype(np.uint8))[1].tobytes()
