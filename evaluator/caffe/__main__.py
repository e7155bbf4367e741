"""`python -m evaluator.caffe`: the converter by itself."""

from .cli import convert

convert(prog_name="python -m evaluator.caffe")
