"""Unpacks the tar of a release into a folder. Refuses members that could leave the folder or fill the disk."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from atserving.errors import StartError

MAX_BYTES = 4 << 30
"""The maximum size of all members together."""

MAX_MEMBERS = 1000

_EXECUTABLE = 0o100


def unpack(tar: Path, folder: Path, max_bytes: int = MAX_BYTES) -> Mapping[str, Path]:
    """Unpack an uncompressed tar below ``folder`` and return the paths of its files by name.

    Raises StartError unless all members are files and folders with relative, unique names. The caller removes the
    files that are already unpacked then.
    """
    try:
        # Not "r:*": the size of a compressed tar is unknown until it is unpacked.
        with tarfile.open(tar, "r:") as archive:
            return _unpack(archive, folder, max_bytes)
    except tarfile.TarError as error:
        # The messages of tarfile may hold local paths.
        reason = (
            "a member leads outside"
            if isinstance(error, tarfile.FilterError)
            else "not an uncompressed tar, or cut short"
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
            raise StartError(f"the release's tar is refused: it holds {name!r} twice")
        seen.add(name)
        archive.extract(member, folder, set_attrs=False, filter="data")
        if member.isreg():
            files[name] = folder / name
            if member.mode & _EXECUTABLE:
                # A script may not change modes itself.
                files[name].chmod(0o755)
    return files


def _safe_name(member: tarfile.TarInfo) -> str:
    """Return the normalized name of a member. Raises StartError if it leads outside or is a link or a device."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        raise StartError(f"the release's tar is refused: {member.name!r} leads outside")
    if not (member.isreg() or member.isdir()):
        raise StartError(f"the release's tar is refused: {member.name!r} is neither a file nor a folder")
    return str(path)
