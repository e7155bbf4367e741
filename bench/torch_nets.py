"""The nets of `bench.nets` in PyTorch, with the same weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bench.nets import CaffeNet, mobilenet, resnet

Weights = Mapping[str, Sequence[np.ndarray]]


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))


def _conv(weights: Weights, name: str, stride: int = 1, pad: int = 0, *, relu: bool = True) -> nn.Sequential:
    """Return a convolution without a bias, and its BatchNorm and Scale."""
    (weight,) = weights[name]
    outputs, inputs, *kernel = weight.shape
    groups = outputs if inputs == 1 else 1
    conv = nn.Conv2d(inputs * groups, outputs, kernel, stride, pad, groups=groups, bias=False)
    conv.weight.data = _tensor(weight)
    mean, variance, factor = weights[f"{name}/bn"]
    batch_norm = nn.BatchNorm2d(outputs, eps=1e-5)
    batch_norm.running_mean = _tensor(mean / factor)
    batch_norm.running_var = _tensor(variance / factor)
    batch_norm.weight.data, batch_norm.bias.data = (_tensor(blob) for blob in weights[f"{name}/scale"])
    return nn.Sequential(conv, batch_norm, *([nn.ReLU()] if relu else []))


class Residual(nn.Module):
    """One block of ResNet: the sum of a bottleneck and a shortcut."""

    def __init__(self, weights: Weights, name: str, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _conv(weights, f"{name}/reduce", stride),
            _conv(weights, f"{name}/middle", pad=1),
            _conv(weights, f"{name}/expand", relu=False),
        )
        self.shortcut: nn.Module = nn.Identity()
        if f"{name}/shortcut" in weights:
            self.shortcut = _conv(weights, f"{name}/shortcut", stride, relu=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


def resnet_50(weights: Weights) -> nn.Module:
    blocks = [
        Residual(weights, f"stage{stage}/block{number}", stride if number == 1 else 1)
        for stage, (_, depth, stride) in enumerate(resnet.STAGES, start=1)
        for number in range(1, depth + 1)
    ]
    weight, bias = weights["classifier"]
    last = nn.Linear(weight.shape[1], weight.shape[0])
    last.weight.data, last.bias.data = _tensor(weight), _tensor(bias)
    first = _conv(weights, "stem", stride=2, pad=3)
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    return nn.Sequential(first, pool, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last, nn.Softmax(1))


def mobilenet_v1(weights: Weights) -> nn.Module:
    parts: list[nn.Module] = [_conv(weights, "stem", stride=2, pad=1)]
    for number, (_, stride) in enumerate(mobilenet.BLOCKS, start=1):
        parts.append(_conv(weights, f"block{number}/depthwise", stride, 1))
        parts.append(_conv(weights, f"block{number}/pointwise"))
    weight, bias = weights["classifier"]
    last = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
    assert last.bias is not None
    last.weight.data, last.bias.data = _tensor(weight), _tensor(bias)
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), last, nn.Softmax(1))


_NETS: Mapping[str, Callable[[Weights], nn.Module]] = {"mobilenet_v1": mobilenet_v1, "resnet_50": resnet_50}


def export(net: CaffeNet, path: Path) -> None:
    """Write PyTorch's own export of a net, for any batch, folded as far as PyTorch folds."""
    module = _NETS[net.name](net.weights).eval()
    image = torch.zeros(2, 3, 224, 224)
    batch = torch.export.Dim("batch")
    # It warns of packages that other nets would need.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            module, (image,), path, dynamo=True, dynamic_shapes=({0: batch},), external_data=False, verbose=False
        )
