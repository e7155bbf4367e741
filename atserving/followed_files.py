"""Files that are read again when they change."""

from __future__ import annotations

from pathlib import Path

_Stamp = tuple[int, int, int]


class FollowedFiles:
    """Files, and whether one of them has changed since the last look at them."""

    def __init__(self, *paths: Path) -> None:
        self.paths = paths
        self._seen = self._stamps()

    def changed(self) -> bool:
        """Return whether one has changed since the last call, or was replaced. Looks at nothing but their status.

        Read them after this call: what changes meanwhile is found by the next one.
        """
        stamps = self._stamps()
        if stamps == self._seen:
            return False
        self._seen = stamps
        return True

    def _stamps(self) -> list[_Stamp]:
        return [_stamp(path) for path in self.paths]


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_mtime_ns, found.st_size
