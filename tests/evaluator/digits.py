"""The release of the example app `digits`, as it is or with other members."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from atserving.local.examples import FOLDER

DIGITS = FOLDER / "digits"
"""The folder of the example: tars of releases, and images of digits."""


def digits_tar(path: Path, **members: bytes | None) -> str:
    """Write the release with some members replaced or added, or removed where None. Return its URI."""
    with tarfile.open(DIGITS / "digits-v1.tar") as source, tarfile.open(path, "w") as target:
        contents: dict[str, bytes | None] = {
            info.name: file.read() for info in source if (file := source.extractfile(info))
        }
        for name, data in (contents | members).items():
            if data is not None:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                target.addfile(info, io.BytesIO(data))
    return f"file://{path}"
