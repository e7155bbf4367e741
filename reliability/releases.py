"""The releases that the mesh of the drills serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atserving.admin.v1 import admin_pb2
from atserving.local.examples import FOLDER
from atserving.local.publishing import release_of
from examples.caffe_files import write_tar

PICTURES = {number: (FOLDER / "digits" / "images" / f"{number}.png").read_bytes() for number in range(10)}
"""A picture of each digit."""

SCENE = (FOLDER / "segment" / "images" / "1.png").read_bytes()
"""A picture of several digits."""


@dataclass(frozen=True)
class Served:
    """A release in production, and how many evaluators serve it."""

    app: str
    version: str
    tar: Path
    instances: int
    custom_values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def classifies(self) -> bool:
        """Whether it names the digit on a picture."""
        return self.custom_values.get("net") == "classify"

    def release(self) -> admin_pb2.Release:
        return release_of(self.app, self.version, self.tar, self.custom_values, admin_pb2.PHASE_PRODUCTION)


_V1, _V2 = (FOLDER / "digits" / f"digits-{version}.tar" for version in ("v1", "v2"))


def digits(version: str, instances: int) -> Served:
    """Return one of the two versions of the app ``digits``, which share its traffic."""
    return Served("digits", version, {"v1": _V1, "v2": _V2}[version], instances, {"net": "classify"})


def quick(instances: int) -> Served:
    """Return another fast app. It scales pixels in its own way, so that its answers differ from those of ``digits``."""
    return Served("quick", "v1", _V1, instances, {"net": "classify", "raw_scale": 0.7})


def segment(instances: int) -> Served:
    """Return the app that labels each pixel."""
    return Served("digits-segment", "v1", FOLDER / "segment" / "digits-segment-v1.tar", instances, {"net": "segment"})


def drill(folder: Path, instances: int) -> Served:
    """Return the app whose net sleeps, hangs, crashes or answers much, as params say. Its tar goes into ``folder``."""
    tar = folder / "drill.tar"
    write_tar(tar, {"net.py": (Path(__file__).parent / "drill" / "net.py").read_bytes()})
    return Served("drill", "v1", tar, instances)
