"""Unpacks a release's tar into a folder, and refuses what could reach outside of it or fill the disk."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from atserving.errors import StartError

MAX_BYTES = 4 << 30
"""The most the members of a tar may hold together."""
MAX_MEMBERS = 1000


def unpack(tar: Path, folder: Path, max_bytes: int = MAX_BYTES) -> Mapping[str, Path]:
    """The files of an uncompressed tar, by name, unpacked below ``folder``. Raises StartError.

    Only files and folders with relative names are taken, each once; what is already on disk when something is refused
    stays for the caller to remove.
    """
    try:
        # Not "r:*": what a compressed tar holds is known only once it has been unpacked.
        with tarfile.open(tar, "r:") as archive:
            return _unpack(archive, folder, max_bytes)
    except tarfile.TarError as error:
        # tarfile's messages may hold local paths.
        reason = (
            "a member leads outside" if isinstance(error, tarfile.FilterError) else "it is no plain tar, or cut short"
        )
        raise StartError(f"the release's tar is refused: {reason}") from error
    except (OSError, ValueError) as error:
        raise StartError(f"the release's tar can't be unpacked: {type(error).__name__}") from error


def _unpack(archive: tarfile.TarFile, folder: Path, max_bytes: int) -> dict[str, Path]:
    files: dict[str, Path] = {}
    seen: set[str] = set()
    total = 0
    for count, member in enumerate(archive, start=1):
        name = _safe_name(member)
        total += member.size
        if count > MAX_MEMBERS:
            raise StartError(f"the release's tar is refused: more than {MAX_MEMBERS} members")
        if total > max_bytes:
            raise StartError(f"the release's tar is refused: its members hold more than {max_bytes} bytes")
        if name in seen:
            raise StartError(f"the release's tar is refused: {name!r} is in it twice")
        seen.add(name)
        archive.extract(member, folder, set_attrs=False, filter="data")
        if member.isreg():
            files[name] = folder / name
    return files


def _safe_name(member: tarfile.TarInfo) -> str:
    """The member's name in its one spelling."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        raise StartError(f"the release's tar is refused: {member.name!r} leads outside")
    if not (member.isreg() or member.isdir()):
        raise StartError(f"the release's tar is refused: {member.name!r} is no file (a link or a device)")
    return str(path)
