"""Keys of somebody who signs releases, and the file that says who may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from atserving import signatures
from atserving.config import Release, validate
from atserving.signatures import SigningKey

ZEROS = "0" * 64


class Signer:
    """Somebody with a key."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.path = folder / name
        self.public = signatures.generate(self.path, name)

    def entry(self, *apps: str) -> dict[str, Any]:
        """Return the entry of the key that may sign for these apps."""
        return {"name": self.name, "public_key": self.public, "apps": apps}

    def signed(self, **fields: Any) -> dict[str, Any]:
        """Return the fields of a release with their signature."""
        return {**fields, "signature": SigningKey(self.path).sign(validate(Release, fields))}


def trusted(path: Path, *entries: dict[str, Any], **more: Any) -> Path:
    """Write the file of trusted keys; return its path."""
    path.write_bytes(orjson.dumps({"keys": entries, **more}))
    return path
