"""MobileNet v1 and ResNet-50 in PyTorch, as their Caffe prototxts have them and with the same weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

Weights = Mapping[str, Sequence[np.ndarray]]


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))


def conv(weights: Weights, name: str, norm: str, stride: int = 1, pad: int = 0, *, relu: bool = True) -> nn.Sequential:
    """A convolution with the BatchNorm and Scale that follow it; `norm` has `{}` for "bn" and for "scale"."""
    blobs = weights[name]
    shape = blobs[0].shape
    groups = shape[0] if shape[1] == 1 else 1
    made = nn.Conv2d(shape[1] * groups, shape[0], shape[2:], stride, pad, groups=groups, bias=len(blobs) > 1)
    made.weight.data = _tensor(blobs[0])
    if made.bias is not None:
        made.bias.data = _tensor(blobs[1])
    mean, variance, factor = weights[norm.format("bn")]
    batch_norm = nn.BatchNorm2d(shape[0], eps=1e-5)
    batch_norm.running_mean = _tensor(mean / factor)
    batch_norm.running_var = _tensor(variance / factor)
    batch_norm.weight.data, batch_norm.bias.data = (_tensor(blob) for blob in weights[norm.format("scale")])
    return nn.Sequential(made, batch_norm, *([nn.ReLU()] if relu else []))


class Residual(nn.Module):
    """One block of ResNet: the sum of a bottleneck and a shortcut."""

    def __init__(self, weights: Weights, name: str, stride: int) -> None:
        super().__init__()

        def branch(which: str, stride: int = 1, pad: int = 0, *, relu: bool = True) -> nn.Sequential:
            return conv(weights, f"res{name}_{which}", f"{{}}{name}_{which}", stride, pad, relu=relu)

        self.long = nn.Sequential(branch("branch2a", stride), branch("branch2b", pad=1), branch("branch2c", relu=False))
        has_branch = f"res{name}_branch1" in weights
        self.short = branch("branch1", stride, relu=False) if has_branch else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.long(x) + self.short(x))


def resnet_50(weights: Weights) -> nn.Module:
    blocks = [
        Residual(weights, f"{stage}{'abcdef'[i]}", 2 if i == 0 and stage > 2 else 1)
        for stage, depth in ((2, 3), (3, 4), (4, 6), (5, 3))
        for i in range(depth)
    ]
    last = nn.Linear(2048, 1000)
    last.weight.data, last.bias.data = (_tensor(blob) for blob in weights["fc1000"])
    first = conv(weights, "conv1", "{}_conv1", stride=2, pad=3)
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    return nn.Sequential(first, pool, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last, nn.Softmax(1))


def mobilenet_v1(weights: Weights) -> nn.Module:
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
    names = ["2_1", "2_2", "3_1", "3_2", "4_1", "4_2", *(f"5_{i}" for i in range(1, 7)), "6"]
    parts: list[nn.Module] = [conv(weights, "conv1", "conv1/{}", stride=2, pad=1)]
    for name, stride in zip(names, strides, strict=True):
        depthwise, pointwise = f"conv{name}/dw", f"conv{name}/sep"
        parts.append(conv(weights, depthwise, f"{depthwise}/{{}}", stride, 1))
        parts.append(conv(weights, pointwise, f"{pointwise}/{{}}"))
    last = nn.Conv2d(1024, 1000, 1)
    assert last.bias is not None
    last.weight.data, last.bias.data = (_tensor(blob) for blob in weights["fc7"])
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), last, nn.Softmax(1))


NETS: dict[str, Any] = {"mobilenet_v1": mobilenet_v1, "resnet-50": resnet_50}


def export(name: str, weights: Weights, path: Path) -> None:
    """PyTorch's own export with any batch, folded as far as it folds."""
    net = NETS[name](weights).eval()
    image = torch.zeros(2, 3, 224, 224)
    batch = torch.export.Dim("batch")
    # It warns of what it lacks for nets that are not these.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            net, (image,), path, dynamo=True, dynamic_shapes=({0: batch},), external_data=False, verbose=False
        )
