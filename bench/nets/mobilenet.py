"""MobileNet v1: depthwise separable convolutions, each with BatchNorm, Scale and ReLU.

Source: Howard and others, MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications, 2017.
"""

from __future__ import annotations

from bench.nets.builder import CaffeNet, NetBuilder

SIZE = 224
STEM = 32
BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)
"""The output channels and the stride of each block."""
CLASSES = 1000


def mobilenet_v1(seed: int = 0, size: int = SIZE) -> CaffeNet:
    """Return MobileNet v1 for pixels less their mean, (N, 3, size, size) BGR."""
    net = NetBuilder("mobilenet_v1", seed)

    def normalized(blob: str) -> str:
        return net.relu(net.batch_norm(blob, blob), blob)

    # The first layer scales pixels down.
    blob = normalized(net.convolution(net.input(3, size, size), "stem", STEM, 3, stride=2, pad=1, scale=1 / 64))
    channels = STEM
    for number, (outputs, stride) in enumerate(BLOCKS, start=1):
        name = f"block{number}"
        depthwise = net.convolution(blob, f"{name}/depthwise", channels, 3, stride=stride, pad=1, group=channels)
        blob = normalized(net.convolution(normalized(depthwise), f"{name}/pointwise", outputs))
        channels = outputs
    pooled = net.global_average(blob, "pool")
    net.softmax(net.convolution(pooled, "classifier", CLASSES, bias=True))
    return net.build()
