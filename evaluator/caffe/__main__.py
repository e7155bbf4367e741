"""Run `atserving convert` as `python -m evaluator.caffe`."""

from .cli import convert

convert(prog_name="python -m evaluator.caffe")
