"""The releases of our own that a local mesh can serve, each with the pictures that one request of it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atserving.v1 import registry_pb2

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples"
"""Of the examples, in a checkout."""


@dataclass(frozen=True)
class Example:
    """A release of an example app; ``tar`` and ``images`` are paths in the examples' folder."""

    app: str
    version: str
    tar: str
    images: tuple[str, ...]
    """What a request takes: one picture, or the several of a group."""
    desc: str
    custom_values: Mapping[str, Any] = field(default_factory=dict)
    phase: registry_pb2.Phase.ValueType = registry_pb2.PHASE_PRODUCTION

    @property
    def path(self) -> Path:
        return FOLDER / self.tar


_SEVEN = ("digits/images/7.png",)
_CLASSIFY = {"net": "classify"}
_NAMES = "names a handwritten digit"

DIGITS = (
    Example(
        app="digits",
        version="v1",
        tar="digits/digits-v1.tar",
        images=_SEVEN,
        desc=_NAMES,
        custom_values=_CLASSIFY,
    ),
    Example(
        app="digits",
        version="v2",
        tar="digits/digits-v2.tar",
        images=_SEVEN,
        desc=_NAMES,
        custom_values=_CLASSIFY,
        phase=registry_pb2.PHASE_STAGING,
    ),
)
"""The app `digits` alone, in both phases."""

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
        desc="says which pixels are which digit",
        custom_values={"net": "segment"},
    ),
    Example(
        app="digits-feature",
        version="v1",
        tar="digits/digits-v1.tar",
        images=_SEVEN,
        desc="what the net of digits v1 makes of a digit, as numbers",
        custom_values={"net": "feature", "layers": ["ip1"]},
    ),
    Example(
        app="digits-similar",
        version="v1",
        tar="similar/digits-similar-v1.tar",
        images=("digits/images/5.png", "digits/images/5.jpg"),
        desc="how alike two digits are, by a net.py",
    ),
)
