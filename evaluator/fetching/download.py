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
from evaluator.fetching.proxy import Proxy
from evaluator.fetching.qiniu import QiniuConfig
from evaluator.fetching.sessions import Sessions
from evaluator.fetching.statuses import REDIRECTS

_CHUNK_BYTES = 1 << 20
_SILENCE_S = 30.0
_TOTAL_S = 3600.0
_MOST_REDIRECTS = 10


async def download(
    uri: str, target: Path, label: str, qiniu: QiniuConfig | None, max_bytes: int, proxy: Proxy | None = None
) -> str:
    """Stream a file to ``target`` and return its sha256.

    Raises StartError, also if a host sends nothing for 30 s, or more than ``max_bytes``, or takes more than an hour.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S)
    sessions = Sessions(max_bytes, proxy, timeout)
    try:
        async with asyncio.timeout(_TOTAL_S) as whole:
            return await _follow(await _locate(uri, sessions, label, qiniu), sessions, target, label, max_bytes)
    except TimeoutError:
        late = f"did not arrive within {_TOTAL_S:g} s"
        raise StartError(
            f"{label}: {late if whole.expired() else f'its host sent nothing for {_SILENCE_S:g} s'}"
        ) from None
    except aiohttp.ClientHttpProxyError as error:
        raise StartError(f"{label}: the proxy answered {error.status}") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        # The text of the error may hold the URL with its token.
        raise StartError(f"{label}: can't be fetched: {type(error).__name__}") from None
    finally:
        await sessions.close()


async def _follow(url: URL, sessions: Sessions, target: Path, label: str, max_bytes: int) -> str:
    for _ in range(_MOST_REDIRECTS + 1):
        # Each host may be one for the proxy, or not.
        async with sessions.of(url).get(url, allow_redirects=False) as response:
            location = response.headers.get("Location")
            if response.status not in REDIRECTS or location is None:
                return await _read(response, target, label, max_bytes)
            url = url.join(URL(location))
    raise StartError(f"{label}: redirects more than {_MOST_REDIRECTS} times")


async def _read(response: aiohttp.ClientResponse, target: Path, label: str, max_bytes: int) -> str:
    if response.status != 200:
        raise StartError(f"{label}: its host answered {response.status}")
    digest = hashlib.sha256()
    size = 0
    with target.open("wb") as file:
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            size += len(chunk)
            if size > max_bytes:
                raise StartError(f"{label}: is larger than {max_bytes} bytes")
            await asyncio.to_thread(file.write, chunk)
            await asyncio.to_thread(digest.update, chunk)
    return digest.hexdigest()


async def _locate(uri: str, sessions: Sessions, label: str, qiniu: QiniuConfig | None) -> URL:
    if not uri.startswith("qiniu://"):
        return URL(uri)
    if not qiniu:
        raise StartError(f"{label}: needs the keys of its owner, see --qiniu")
    try:
        named = QiniuUri.parse(uri)
    except ServingError:
        raise StartError(f"{label}: should be qiniu://[uid@]zone/bucket/key") from None
    try:
        return await Buckets(qiniu, sessions).url(named, label)
    except ServingError as error:
        raise StartError(error.message) from None
