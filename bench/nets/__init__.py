"""Caffe nets made in code: the layouts of MobileNet v1 and ResNet-50, with random weights from a seed.

The layouts are published facts; the generator, the names of the layers and the weights are our own. The weights are
not trained, so the answers mean nothing. A net's cost depends on its layout alone.
"""

from bench.nets.builder import CaffeNet, NetBuilder
from bench.nets.mobilenet import mobilenet_v1
from bench.nets.resnet import resnet_50

__all__ = ["CaffeNet", "NetBuilder", "mobilenet_v1", "resnet_50"]
