"""Converts Caffe networks, prototxt and caffemodel, to ONNX."""

from .convert import convert
from .errors import ConversionError

__all__ = ["ConversionError", "convert"]
