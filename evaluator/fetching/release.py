"""Fetches a release: downloads its tar and custom files, checks their digests and unpacks the tar."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import msgspec

from atserving.config import Release
from atserving.errors import StartError
from evaluator.fetching.proxy import Proxy
from evaluator.fetching.unpack import unpack
from evaluator.net_config import SCRIPT, NetConfig
from evaluator.options import Options

if TYPE_CHECKING:
    from atserving.signatures import TrustedKeys
    from evaluator.fetching.qiniu import QiniuConfig

MAX_FILE_BYTES = 4 << 30
"""The maximum size of a tar or a custom file."""

WORKSPACE_MARK = ".atserving-workspace"
"""The name of a file that is in the workspace of each evaluator, and that no script can remove."""

_PART_BYTES = 1 << 20
_KERNEL = ("/proc", "/sys", "/dev")
_REQUIRED = ("deploy.prototxt", "weight.caffemodel")


async def fetch_release(
    release: Release,
    workspace: Path,
    qiniu: QiniuConfig | None = None,
    digests: dict[str, str] | None = None,
    proxy: Proxy | None = None,
    *,
    copied: bool = False,
) -> NetConfig:
    """Fetch a release into ``workspace``, a folder of its own, unpack it, and return the config of its net.

    A release with ``qiniu://`` files needs ``qiniu``. If ``digests`` is given, it gets the sha256 of each file by the
    field that names it. With ``copied``, local files are copied, too, so that what was checked is what is used. Raises
    StartError with one line for the operator.
    """
    downloads, files, scratch = workspace / "downloads", workspace / "release", workspace / "scratch"
    for folder in (downloads, files, scratch):
        folder.mkdir()
    tar = await _fetch(release.file, downloads / "release.tar", "file", qiniu, digests, proxy, copied)
    tar_files = await asyncio.to_thread(unpack, tar, files)
    if tar.is_relative_to(downloads):
        tar.unlink()
    if SCRIPT not in tar_files:
        for name in _REQUIRED:
            if name not in tar_files:
                raise StartError(f"the release's tar has no {name}")
    custom_files = {
        name: await _fetch(uri, downloads / f"custom-{number}", f"custom_files.{name}", qiniu, digests, proxy, copied)
        for number, (name, uri) in enumerate(release.custom_files.items())
    }
    return NetConfig(
        tar_files=tar_files,
        custom_files=custom_files,
        custom_values=Options("custom_values", release.custom_values),
        model_params=Options("model_params", release.model_params),
        workspace=scratch,
        image_width=release.image_width,
        batch_size=release.batch_size,
        use_device=release.use_device,
    )


def check_signature(release: Release, trusted: TrustedKeys | None) -> str:
    """Return the name of the key that has signed a release; empty if nobody needs to. Raises StartError."""
    if not trusted:
        return ""
    from atserving.signatures import Untrusted

    try:
        return trusted.signer(release)
    except Untrusted as error:
        raise StartError(f"{release.name} {release.version} may not run, see --trusted-keys: {error}") from None


def with_local_files(release: Release, folders: Sequence[Path], own: Sequence[Path]) -> Release:
    """Return a release whose local files are named by their real paths: links may lead elsewhere later.

    Raises StartError if it names one that its net, which may show it to callers, must not have. Such are the kernel's,
    the evaluator's ``own``, those in workspaces, and those outside of ``folders``, if there are some.
    """

    def real(field: str, uri: str) -> str:
        bare, _ = _split_digest(uri, field)
        if not bare.startswith("file://"):
            return uri
        path = _local_path(bare, field).resolve()
        if any(path.is_relative_to(folder) for folder in _KERNEL) or path in {each.resolve() for each in own}:
            raise StartError(f"{field} {bare}: is no file for releases")
        # A script there could lead the path elsewhere.
        if any((folder / WORKSPACE_MARK).exists() for folder in path.parents):
            raise StartError(f"{field} {bare}: is in the workspace of an evaluator")
        if folders and not any(path.is_relative_to(folder.resolve()) for folder in folders):
            raise StartError(f"{field} {bare}: is in no folder of --local-files")
        return path.as_uri() + uri.removeprefix(bare)

    custom_files = {name: real(f"custom_files.{name}", uri) for name, uri in release.custom_files.items()}
    return msgspec.structs.replace(release, file=real("file", release.file), custom_files=custom_files)


async def _fetch(
    uri: str,
    target: Path,
    field: str,
    qiniu: QiniuConfig | None,
    digests: dict[str, str] | None,
    proxy: Proxy | None,
    copied: bool,
) -> Path:
    """Fetch a file and return its path: ``target``, or the file itself if it is local. ``field`` is its field."""
    bare, expected = _split_digest(uri, field)
    if bare.startswith("file://"):
        path = _local_path(bare, field)
        wanted = bool(expected) or digests is not None
        if copied:
            digest = await asyncio.to_thread(_copy, path, target, bare, field)
            path = target
        else:
            digest = await asyncio.to_thread(_file_digest, path, bare, field) if wanted else ""
    else:
        # Imported here: its HTTP client costs time and memory that local files don't need.
        from evaluator.fetching.download import download

        path = target
        digest = await download(bare, target, f"{field} {_redacted(bare)}", qiniu, MAX_FILE_BYTES, proxy)
    if expected and digest != expected:
        raise StartError(f"{field} {_redacted(bare)}: its sha256 is {digest}, not {expected}")
    if digests is not None:
        digests[field] = digest
    return path


def _split_digest(uri: str, field: str) -> tuple[str, str]:
    # The key in a qiniu:// URI is not quoted and may contain a #.
    mark = "#sha256=" if uri.startswith("qiniu://") else "#"
    bare = uri.partition(mark)[0]
    fragment = uri.removeprefix(bare)
    if fragment in ("", "#"):
        return bare, ""
    match = re.fullmatch(r"#sha256=([0-9a-fA-F]{64})", fragment)
    if not match:
        raise StartError(f"{field} {_redacted(bare)}: {fragment[:80]} should be #sha256= and 64 hex digits")
    return bare, match[1].lower()


def _local_path(uri: str, field: str) -> Path:
    parts = urlsplit(uri)
    path = Path(unquote(parts.path))
    if parts.netloc not in ("", "localhost") or not path.is_absolute():
        raise StartError(f"{field} {uri}: should be file:// and an absolute path")
    if not path.is_file():
        raise StartError(f"{field} {uri}: there is no such file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise StartError(f"{field} {uri}: is larger than {MAX_FILE_BYTES} bytes")
    return path


def _file_digest(path: Path, uri: str, field: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StartError(f"{field} {uri}: can't be read: {error.strerror}") from error


def _copy(path: Path, target: Path, uri: str, field: str) -> str:
    """Copy a file, and return the digest of the copy."""
    digest = hashlib.sha256()
    left = MAX_FILE_BYTES
    try:
        with path.open("rb") as source, target.open("wb") as copy:
            while part := source.read(_PART_BYTES):
                left -= len(part)
                if left < 0:
                    raise StartError(f"{field} {uri}: is larger than {MAX_FILE_BYTES} bytes")
                digest.update(part)
                copy.write(part)
    except OSError as error:
        raise StartError(f"{field} {uri}: can't be copied: {error.strerror}") from error
    return digest.hexdigest()


def _redacted(uri: str) -> str:
    """Remove credentials and the query: both may be secret."""
    return re.sub(r"(://)[^/]*@", r"\1", uri.partition("?")[0])
