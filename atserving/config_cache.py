"""Keeps the last config in a file, for a start while no registry answers."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import structlog

from atserving.config import ConfigValue
from atserving.v1 import registry_pb2

log = structlog.get_logger()


class _Saved(msgspec.Struct):
    app: str
    saved_s: float
    """Seconds since the epoch."""
    entries: dict[str, str]
    """The JSON of each key's value."""


class ConfigCache:
    """A file with the config of one app, or of all apps (the empty name)."""

    def __init__(self, path: Path, app: str) -> None:
        self._path = path
        self._app = app
        self.saved_s = 0.0
        """When the config was saved that was loaded last, in seconds since the epoch."""

    def load(self) -> registry_pb2.WatchResponse | None:
        """Return the saved config as a snapshot; None if there is none that can be read."""
        try:
            saved = msgspec.json.decode(self._path.read_bytes(), type=_Saved)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            log.warning("config cache unusable", path=str(self._path), reason=str(error))
            return None
        if saved.app != self._app:
            log.warning("config cache unusable", path=str(self._path), reason=f"it is of app {saved.app!r}")
            return None
        self.saved_s = saved.saved_s
        age_s = max(0, round(time.time() - saved.saved_s))
        log.warning("config cache used", path=str(self._path), age_s=age_s, keys=len(saved.entries))
        entries = [registry_pb2.Entry(key=key, value_json=value) for key, value in saved.entries.items()]
        return registry_pb2.WatchResponse(reset=True, upserts=entries)

    def save(self, entries: Mapping[str, ConfigValue]) -> None:
        """Replace the saved config at once. Blocks on the disk; a failure is logged."""
        values = {key: value.to_json() for key, value in entries.items()}
        data = msgspec.json.encode(_Saved(self._app, time.time(), values))
        try:
            self._replace(data)
        except OSError as error:
            log.warning("config cache write failed", path=str(self._path), reason=str(error))

    def _replace(self, data: bytes) -> None:
        # Only its owner may read the file, which names the resources of all apps.
        number, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        try:
            with os.fdopen(number, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(number)
            os.replace(name, self._path)
        except BaseException:
            os.unlink(name)
            raise
