"""Decodes images for nets: JPEG, PNG, BMP, WebP and GIF to upright BGR pixels, within a release's limits.

Import from here; the modules below are private. An image is read in two steps: its header is checked against the
limits (``formats`` and a module for each format), then OpenCV or Pillow decodes it (``decoding``). A small image that
would take a decoder much memory or time is refused in the first step.
"""

from evaluator.images.decoding import Picture, Pixels, decode, read, sample

__all__ = ["Picture", "Pixels", "decode", "read", "sample"]
