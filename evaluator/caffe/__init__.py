"""Converts Caffe networks, prototxt and caffemodel, to ONNX.

    model = convert("deploy.prototxt", "weight.caffemodel")

The modules in the order in which a net passes them: `prototxt` and `caffemodel` read, `net` decides what runs, `layers`
convert one layer at a time into a `graph`, `passes` rewrite it, `export` makes the model.
"""

from .convert import convert
from .errors import ConversionError
from .summary import LayerSummary, Summary, summarize

__all__ = [
    "ConversionError",
    "LayerSummary",
    "Summary",
    "convert",
    "summarize",
]
