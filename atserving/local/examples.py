"""The example releases that a local mesh can serve, each with the pictures of one request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from atserving.admin.v1 import admin_pb2

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
FOLDER = ROOT / "examples"
"""The examples' folder in a checkout."""


@dataclass(frozen=True)
class Example:
    """A release of an example app; ``tar`` and ``images`` are paths in the examples' folder."""

    app: str
    version: str
    tar: str
    images: tuple[str, ...]
    """The pictures of one request: one, or the several of a group."""
    desc: str
    custom_values: Mapping[str, Any] = field(default_factory=dict)
    phase: admin_pb2.Phase.ValueType = admin_pb2.PHASE_PRODUCTION

    @property
    def path(self) -> Path:
        return FOLDER / self.tar


_DIGITS_V1 = Example(
    app="digits",
    version="v1",
    tar="digits/digits-v1.tar",
    images=("digits/images/7.png",),
    desc="names a handwritten digit",
    custom_values={"net": "classify"},
)

DIGITS = (
    _DIGITS_V1,
    replace(_DIGITS_V1, version="v2", tar="digits/digits-v2.tar", phase=admin_pb2.PHASE_STAGING),
)
"""The app `digits` alone, with a version in each phase."""

ALL = (
    *DIGITS,
    Example(
        app="digits-detect",
        version="v1",
        tar="detect/digits-detect-v1.tar",
        images=("detect/images/1.png",),
        desc="finds digits on an image",
        custom_values={"net": "detect", "threshold": 0.5},
    ),
    Example(
        app="digits-segment",
        version="v1",
        tar="segment/digits-segment-v1.tar",
        images=("segment/images/1.png",),
        desc="labels each pixel with its digit",
        custom_values={"net": "segment"},
    ),
    Example(
        app="digits-feature",
        version="v1",
        tar="digits/digits-v1.tar",
        images=("digits/images/7.png",),
        desc="returns the features that digits v1 computes of a digit",
        custom_values={"net": "feature", "layers": ["ip1"]},
    ),
    Example(
        app="digits-similar",
        version="v1",
        tar="similar/digits-similar-v1.tar",
        images=("digits/images/5.png", "digits/images/5.jpg"),
        desc="compares two digits with a net.py",
    ),
)
