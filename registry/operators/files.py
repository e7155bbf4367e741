"""Files that are read again when they change."""

from __future__ import annotations

from pathlib import Path


class FollowedFile:
    """A file, and whether it has changed since the last look at it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = self._stamp()

    def changed(self) -> bool:
        """Return whether it has changed since the last call, or was replaced. Looks at nothing but its status."""
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        self._seen = stamp
        return True

    def _stamp(self) -> tuple[int, int, int]:
        try:
            found = self.path.stat()
        except OSError:
            return (0, 0, 0)
        return found.st_ino, found.st_mtime_ns, found.st_size
