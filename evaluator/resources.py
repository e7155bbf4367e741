"""From a request's resources to their bytes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import aiohttp
from yarl import URL

from atserving import __version__, uris
from atserving.errors import InvalidArgument, ResourceUnreachable
from evaluator.addresses import AddressPolicy, PolicyResolver

_TOTAL_S = 10.0
_CONNECT_S = 3.0
_MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK_BYTES = 256 << 10
_CONNECTIONS = 100
_CONNECTIONS_PER_HOST = 16


@dataclass(frozen=True)
class Source:
    """Where a resource's bytes are: in ``body``, or at ``uri``. Exactly one is not None."""

    uri: str | None = None
    body: bytes | None = None


class ResourceFetcher:
    """Fetches resources of at most ``max_bytes`` each, over one pool of connections.

    Used as an async context manager, on the event loop that it is entered on.
    """

    def __init__(self, max_bytes: int, policy: AddressPolicy) -> None:
        self._max_bytes = max_bytes
        self._policy = policy
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> ResourceFetcher:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=PolicyResolver(self._policy), limit=_CONNECTIONS, limit_per_host=_CONNECTIONS_PER_HOST
            ),
            # One caller's cookies are not another's; proxies of the environment would resolve names themselves.
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            headers={"User-Agent": f"atserving/{__version__}", "Accept-Encoding": "identity"},
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session:
            await self._session.close()

    async def fetch(self, source: Source) -> bytes:
        """The bytes. Raises InvalidArgument for what is the request's fault, ResourceUnreachable for a host's."""
        data = source.body if source.uri is None else await self._fetch_uri(source.uri)
        if data is None:
            raise InvalidArgument("the request's data has neither a uri nor a body")
        self.check_size(len(data))
        return data

    def check_size(self, size: int) -> None:
        """Raises InvalidArgument for a resource of so many bytes, where these are too many."""
        if size > self._max_bytes:
            raise self._too_large("the resource")

    async def _fetch_uri(self, uri: str) -> bytes:
        match uris.scheme(uri):
            case "data":
                return uris.decode_data(uri)
            case "qiniu":
                raise InvalidArgument(f"{uris.shown(uri)}: qiniu resources are not supported yet")
            case _:
                return await self._fetch_http(uri)

    async def _fetch_http(self, uri: str) -> bytes:
        shown = f"resource {uris.shown(uri)}"
        try:
            async with asyncio.timeout(_TOTAL_S):
                return await self._follow(self._checked(uri, shown), shown)
        except TimeoutError:
            raise ResourceUnreachable(f"{shown} did not come within {_TOTAL_S:g} s") from None
        except aiohttp.InvalidURL:
            raise InvalidArgument(f"{shown}: bad url") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ResourceUnreachable(f"{shown} could not be reached: {_reason(error)}") from None

    async def _follow(self, url: URL, shown: str) -> bytes:
        assert self._session
        for _ in range(_MAX_REDIRECTS + 1):
            async with self._session.get(url, allow_redirects=False) as response:
                location = response.headers.get("Location")
                if response.status not in _REDIRECTS or location is None:
                    return await self._read(response, shown)
                url = self._checked(str(url.join(_url(location, shown))), shown)
        raise InvalidArgument(f"{shown} redirects more than {_MAX_REDIRECTS} times")

    def _checked(self, uri: str, shown: str) -> URL:
        """The URL, where its scheme and, if it is no name, its address may be fetched from."""
        url = _url(uri, shown)
        if url.scheme not in ("http", "https") or not url.host:
            raise InvalidArgument(f"{shown} leads to {uris.shown(uri)}, which is no http url")
        # What aiohttp takes for an address never comes to the resolver, which checks names.
        looks_like_address = ":" in url.host or url.host.replace(".", "").isdigit()
        if looks_like_address and not self._policy.allows(url.host):
            raise InvalidArgument(f"resources may not be fetched from {url.host!r}: not a public address")
        return url

    async def _read(self, response: aiohttp.ClientResponse, shown: str) -> bytes:
        if 400 <= response.status < 500:
            raise InvalidArgument(f"{shown}: its host answered {response.status}")
        if not 200 <= response.status < 300:
            raise ResourceUnreachable(f"{shown}: its host answered {response.status}")
        if (response.content_length or 0) > self._max_bytes:
            raise self._too_large(shown)
        chunks: list[bytes] = []
        size = 0
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            size += len(chunk)
            if size > self._max_bytes:
                raise self._too_large(shown)
            chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _too_large(self, shown: str) -> InvalidArgument:
        return InvalidArgument(f"{shown} is larger than {self._max_bytes} bytes")


def _url(text: str, shown: str) -> URL:
    try:
        url = URL(text)
        # Both are parsed only when read.
        _ = url.host, url.port
    except ValueError:
        raise InvalidArgument(f"{shown}: bad url") from None
    return url


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "unknown host"
    if isinstance(error, aiohttp.ClientSSLError):
        return "TLS failed"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "cannot connect"
    return "the connection broke"
