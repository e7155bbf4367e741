"""Find the folders of the local meshes that run, or have run, on this machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

PREFIX = "atserving-"
"""The names of the folders begin with it."""

TARGETS_FILE = "targets.json"
"""The file in the folder of a mesh with the addresses of all ``/metrics``, as Prometheus' file_sd_configs read them."""


def local_meshes() -> list[Path]:
    """Return the folders of this user's local meshes, the newest first. Some may have ended without a clean-up."""
    found: list[tuple[float, Path]] = []
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            stat = (folder / TARGETS_FILE).lstat()
        except OSError:
            continue
        # The folder is shared: somebody else's file could name other targets.
        if stat.st_uid == os.geteuid():
            found.append((stat.st_mtime, folder))
    return [folder for _, folder in sorted(found, reverse=True)]
