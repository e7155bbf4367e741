"""Reads a WebP's header."""

from __future__ import annotations

from evaluator.images.header import Header, read_with_pillow
from evaluator.limits import Limits


def read_header(data: bytes, limits: Limits) -> Header:
    """Return the header of a WebP, still or animated."""
    return read_with_pillow("WEBP", data, limits)
