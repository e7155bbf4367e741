"""Runs converted nets on onnxruntime, on a CPU or a GPU, and makes their inputs out of pixels."""
