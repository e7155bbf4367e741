"""The folder for the files of one process. A start removes the folders that killed processes have left.

A lock tells the folder of a living process from one that is left: the kernel releases it with the process.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from atserving.errors import StartError
from evaluator.fetching.release import WORKSPACE_MARK

log = structlog.get_logger()

_PREFIX = "atserving-"
_LOCK = WORKSPACE_MARK


@contextmanager
def workspace(parent: Path | None, name: str) -> Iterator[Path]:
    """A folder of this process alone in ``parent`` (None: the system's folder for such), removed at the end.

    Before that, remove the folders there whose processes have died. Raises StartError.
    """
    try:
        if parent:
            parent.mkdir(parents=True, exist_ok=True)
        parent = parent or Path(tempfile.gettempdir())
        _sweep(parent)
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{name}-", dir=parent))
        lock = _locked(folder)
    except OSError as error:
        raise StartError(f"can't make a workspace: {error.strerror}") from error
    try:
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def _locked(folder: Path) -> int:
    """Put a locked file into a folder, and return its descriptor. No one sees the file before it is locked."""
    unlocked = folder / f"{_LOCK}.new"
    lock = os.open(unlocked, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    unlocked.rename(folder / _LOCK)
    return lock


def _sweep(parent: Path) -> None:
    """Remove each folder of a dead process of this user. Leave all else alone: it is not ours."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            lock = _open_lock(folder)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another process that starts now may have removed it first.
                if os.fstat(lock).st_nlink:
                    _remove(folder)
                    log.debug("workspace removed", path=str(folder), reason="its process was killed")
            finally:
                os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a folder as far as possible, its lock last: if this process is killed meanwhile, another can go on."""
    with suppress(OSError):
        for each in os.scandir(folder):
            if each.is_dir(follow_symlinks=False):
                _remove_tree(each.path)
            elif each.name != _LOCK:
                os.unlink(each.path)
        shutil.rmtree(folder, ignore_errors=True)


def _remove_tree(folder: str) -> None:
    with suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        # A script has nested folders deeper than Python follows them, or made some that their owner may not read.
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, "--", folder], check=False, stderr=subprocess.DEVNULL)


def _open_lock(folder: Path) -> int:
    """Open the lock of a workspace. Raises OSError if the folder is none, or another user's."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        lock = os.open(_LOCK, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=opened)
        if os.fstat(opened).st_uid == os.fstat(lock).st_uid == os.geteuid() and stat.S_ISREG(os.fstat(lock).st_mode):
            return lock
        os.close(lock)
        raise PermissionError
    finally:
        os.close(opened)
