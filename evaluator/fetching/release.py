"""Fetches a release: downloads its tar and custom files, checks their digests and unpacks the tar."""

from __future__ import annotations

import asyncio
import hashlib
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import aiohttp
from yarl import URL

from atserving.config import Release
from atserving.errors import ServingError, StartError
from atserving.uris import QiniuUri
from evaluator.fetching.qiniu import Buckets, QiniuConfig
from evaluator.fetching.unpack import unpack
from evaluator.net_config import SCRIPT, NetConfig
from evaluator.options import Options

MAX_FILE_BYTES = 4 << 30
"""The maximum size of a tar or a custom file."""

_CHUNK_BYTES = 1 << 20
_SILENCE_S = 30.0
_REQUIRED = ("deploy.prototxt", "weight.caffemodel")


async def fetch_release(release: Release, workspace: Path, qiniu: QiniuConfig | None = None) -> NetConfig:
    """Fetch a release into ``workspace``, a folder of its own, unpack it, and return the config of its net.

    A release with ``qiniu://`` files needs ``qiniu``. Raises StartError with one line for the operator.
    """
    downloads, files = workspace / "downloads", workspace / "release"
    downloads.mkdir()
    files.mkdir()
    tar = await _fetch(release.file, downloads / "release.tar", "file", qiniu)
    tar_files = await asyncio.to_thread(unpack, tar, files)
    if tar.is_relative_to(downloads):
        tar.unlink()
    if SCRIPT not in tar_files:
        for name in _REQUIRED:
            if name not in tar_files:
                raise StartError(f"the release's tar has no {name}")
    custom_files = {
        name: await _fetch(uri, downloads / f"custom-{number}", f"custom_files.{name}", qiniu)
        for number, (name, uri) in enumerate(release.custom_files.items())
    }
    return NetConfig(
        tar_files=tar_files,
        custom_files=custom_files,
        custom_values=Options("custom_values", release.custom_values),
        model_params=Options("model_params", release.model_params),
        workspace=workspace,
        image_width=release.image_width,
        batch_size=release.batch_size,
        use_device=release.use_device,
    )


async def _fetch(uri: str, target: Path, field: str, qiniu: QiniuConfig | None) -> Path:
    """Fetch a file and return its path: ``target``, or the file itself if it is local. ``field`` is its field."""
    bare, expected = _split_digest(uri, field)
    if bare.startswith("file://"):
        path = _local_path(bare, field)
        digest = await asyncio.to_thread(_file_digest, path, bare, field) if expected else ""
    else:
        path = target
        digest = await _download(bare, target, f"{field} {_redacted(bare)}", qiniu)
    if expected and digest != expected:
        raise StartError(f"{field} {_redacted(bare)}: its sha256 is {digest}, not {expected}")
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


async def _download(uri: str, target: Path, label: str, qiniu: QiniuConfig | None) -> str:
    """Stream a file to ``target`` and return its sha256. Raises StartError; a host may pause for 30 s at most."""
    digest = hashlib.sha256()
    size = 0
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(await _locate(uri, session, label, qiniu)) as response,
        ):
            if response.status != 200:
                raise StartError(f"{label}: its host answered {response.status}")
            with target.open("wb") as file:
                async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
                    size += len(chunk)
                    if size > MAX_FILE_BYTES:
                        raise StartError(f"{label}: is larger than {MAX_FILE_BYTES} bytes")
                    await asyncio.to_thread(file.write, chunk)
                    await asyncio.to_thread(digest.update, chunk)
    except TimeoutError:
        raise StartError(f"{label}: its host sent nothing for {_SILENCE_S:g} s") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        # The text of the error may hold the URL with its token.
        raise StartError(f"{label}: can't be fetched: {type(error).__name__}") from None
    return digest.hexdigest()


async def _locate(uri: str, session: aiohttp.ClientSession, label: str, qiniu: QiniuConfig | None) -> URL:
    if not uri.startswith("qiniu://"):
        return URL(uri)
    if not qiniu:
        raise StartError(f"{label}: needs the keys of its owner, see --qiniu")
    try:
        named = QiniuUri.parse(uri)
    except ServingError:
        raise StartError(f"{label}: should be qiniu://[uid@]zone/bucket/key") from None
    try:
        return await Buckets(qiniu, session).url(named, label)
    except ServingError as error:
        raise StartError(error.message) from None


def _redacted(uri: str) -> str:
    """Remove credentials and the query: both may be secret."""
    return re.sub(r"(://)[^/]*@", r"\1", uri.partition("?")[0])
