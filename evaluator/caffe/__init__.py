"""Convert Caffe nets (prototxt and caffemodel) to ONNX.

    model = convert("deploy.prototxt", "weight.caffemodel")

A net passes the modules in this order: `prototxt` and `caffemodel` read the files, `net_plan` selects the layers that
run at test time, `layers` converts them one at a time into a `graph`, `passes` optimizes the graph, and `export` builds
the ONNX model.
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
