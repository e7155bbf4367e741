"""Downloads the files of a release over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import aiohttp
from yarl import URL

from atserving.errors import ServingError, StartError
from atserving.uris import QiniuUri
from evaluator.fetching.buckets import Buckets
from evaluator.fetching.qiniu import QiniuConfig

_CHUNK_BYTES = 1 << 20
_SILENCE_S = 30.0


async def download(uri: str, target: Path, label: str, qiniu: QiniuConfig | None, max_bytes: int) -> str:
    """Stream a file to ``target`` and return its sha256.

    Raises StartError, also if a host sends nothing for 30 s, or more than ``max_bytes``.
    """
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
                    if size > max_bytes:
                        raise StartError(f"{label}: is larger than {max_bytes} bytes")
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
