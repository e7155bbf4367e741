"""Follows the files of certificates, which those who issue them replace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from atserving.errors import StartError
from atserving.followed_files import FollowedFiles

log = structlog.get_logger()

T = TypeVar("T")


class Certificates(Generic[T]):
    """A value made of the files of a certificate, always of those that are there now. Wrong ones change nothing.

    It looks at the files whenever it is asked, which takes a few microseconds.
    """

    def __init__(self, files: Sequence[Path], load: Callable[[], T]) -> None:
        """``load`` reads the files. Raises StartError, as it does."""
        self._files = FollowedFiles(*files)
        self._load = load
        self._value = load()

    @property
    def now(self) -> T:
        """The value of the last right files."""
        if self._files.changed():
            names = [str(each) for each in self._files.paths]
            try:
                self._value = self._load()
                log.info("certificates changed", files=names)
            except StartError as error:
                log.error("certificates unchanged", files=names, reason=str(error))
        return self._value
