"""ResNet-50: residual blocks of three convolutions, each with BatchNorm and Scale.

Source: He and others, Deep Residual Learning for Image Recognition, 2015. The strides and the pooling follow the
authors' nets for Caffe: the first 1x1 convolution of a block has its stride, and the pooling rounds up.
"""

from __future__ import annotations

from bench.nets.builder import CaffeNet, NetBuilder

SIZE = 224
STEM = 64
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
"""The inner channels of each stage, the number of its blocks, and the stride of the first."""
EXPANSION = 4
"""Output channels of a block for each inner channel."""
CLASSES = 1000
# The share of a branch in the sum with its shortcut: sixteen blocks must not blow up the activations.
_BRANCH = 0.3


def resnet_50(seed: int = 0, size: int = SIZE) -> CaffeNet:
    """Return ResNet-50 for pixels less their mean, (N, 3, size, size) BGR."""
    net = NetBuilder("resnet_50", seed)
    stem = net.convolution(net.input(3, size, size), "stem", STEM, 7, stride=2, pad=3, scale=1 / 64)
    blob = net.pooling(net.relu(net.batch_norm(stem, "stem"), "stem"), "stem/pool", "MAX", 3, stride=2)
    for stage, (channels, blocks, first_stride) in enumerate(STAGES, start=1):
        for number in range(1, blocks + 1):
            blob = _block(
                net, blob, f"stage{stage}/block{number}", channels, first_stride if number == 1 else 1, number == 1
            )
    pooled = net.global_average(blob, "pool")
    net.softmax(net.inner_product(pooled, "classifier", EXPANSION * STAGES[-1][0], CLASSES, scale=0.25))
    return net.build()


def _block(net: NetBuilder, blob: str, name: str, channels: int, stride: int, first: bool) -> str:
    """Add a block; the ``first`` of a stage changes the shape, so its shortcut is a convolution too."""
    outputs = EXPANSION * channels
    shortcut = blob
    if first:
        shortcut = net.convolution(blob, f"{name}/shortcut", outputs, stride=stride)
        net.batch_norm(shortcut, shortcut)
    branch = net.convolution(blob, f"{name}/reduce", channels, stride=stride)
    net.relu(net.batch_norm(branch, branch), branch)
    branch = net.convolution(branch, f"{name}/middle", channels, 3, pad=1)
    net.relu(net.batch_norm(branch, branch), branch)
    branch = net.convolution(branch, f"{name}/expand", outputs)
    net.batch_norm(branch, branch, scale=_BRANCH)
    return net.relu(net.add([shortcut, branch], f"{name}/sum"), name)
