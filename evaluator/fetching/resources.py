"""Fetches the resources of requests."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import aiohttp
from aiohttp.abc import AbstractResolver
from aiohttp.resolver import AsyncResolver
from yarl import URL

from atserving import __version__, uris
from atserving.errors import InvalidArgument, ResourceUnreachable
from atserving.uris import QiniuUri
from evaluator.fetching.addresses import AddressPolicy, AddressRefused, PolicyResolver
from evaluator.fetching.qiniu import Buckets, QiniuConfig, is_refusal
from evaluator.limits import Budget

_TOTAL_S = 10.0
_CONNECT_S = 3.0
_MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
# Tiny chunks cost far more to read than their bytes.
_MAX_CHUNKS = 1 << 16
_CONNECTIONS = 256
_CONNECTIONS_PER_HOST = 16


class ResourceFetcher:
    """Fetches resources of at most ``max_bytes`` each over one connection pool.

    An async context manager. Use it only on the event loop that entered it.
    """

    def __init__(
        self,
        max_bytes: int,
        policy: AddressPolicy,
        qiniu: QiniuConfig | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        """Without ``qiniu``, refuse ``qiniu://`` URIs. ``resolver`` defaults to the DNS settings of this machine."""
        self._max_bytes = max_bytes
        self._policy = policy
        self._qiniu = qiniu
        self._resolver = resolver
        self._session: aiohttp.ClientSession | None = None
        self._buckets: Buckets | None = None

    async def __aenter__(self) -> ResourceFetcher:
        async with AsyncExitStack() as stack:
            # Not in threads: lookups that get no reply would occupy all of them.
            resolver = PolicyResolver(self._policy, self._resolver or AsyncResolver())
            stack.push_async_callback(resolver.close)
            connector = aiohttp.TCPConnector(
                resolver=resolver,
                socket_factory=self._policy.socket,
                limit=_CONNECTIONS,
                limit_per_host=_CONNECTIONS_PER_HOST,
            )
            self._session = await stack.enter_async_context(
                aiohttp.ClientSession(
                    connector=connector,
                    # Callers must not share cookies. A proxy from the environment would resolve names itself.
                    cookie_jar=aiohttp.DummyCookieJar(),
                    trust_env=False,
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
                    headers={"User-Agent": f"atserving/{__version__}", "Accept-Encoding": "identity"},
                )
            )
            if self._qiniu:
                self._buckets = Buckets(self._qiniu, self._session)
                stack.push_async_callback(self._buckets.close)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def fetch(self, uri: str, budget: Budget | None = None) -> bytes:
        """Fetch a resource and take its bytes from ``budget``, the request's (None: this is its only resource).

        Raises InvalidArgument for errors of the request and ResourceUnreachable for errors of a host.
        """
        budget = budget or Budget(self._max_bytes)
        if uris.scheme(uri) == "data":
            return self.decode(uri, budget)
        label = f"resource {uris.redacted(uri)}"
        try:
            async with asyncio.timeout(_TOTAL_S):
                return await self._follow(await self._locate(uri, label), label, budget)
        except TimeoutError:
            raise ResourceUnreachable(f"{label} did not arrive within {_TOTAL_S:g} s") from None
        except AddressRefused as refused:
            raise InvalidArgument(f"{label} may not be fetched: {refused}") from None
        except aiohttp.InvalidURL:
            raise InvalidArgument(f"{label}: bad url") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ResourceUnreachable(f"{label} could not be reached: {_reason(error)}") from None

    def decode(self, uri: str, budget: Budget) -> bytes:
        """Return the bytes of a data URI, and take them from ``budget``. Raises InvalidArgument."""
        data = uris.decode_data(uri)
        if len(data) > self._max_bytes:
            raise self._too_large("the resource")
        budget.take(len(data))
        return data

    async def _locate(self, uri: str, label: str) -> URL:
        if uris.scheme(uri) != "qiniu":
            return _http_url(uri, label)
        named = QiniuUri.parse(uri)
        if not (self._qiniu and self._buckets):
            raise InvalidArgument(f"{label}: qiniu resources are not set up for this app")
        if named.bucket not in self._qiniu.buckets:
            raise InvalidArgument(f"{label}: requests may not read from this bucket")
        return await self._buckets.url(named, label)

    async def _follow(self, url: URL, label: str, budget: Budget) -> bytes:
        assert self._session
        for _ in range(_MAX_REDIRECTS + 1):
            async with self._session.get(url, allow_redirects=False) as response:
                location = response.headers.get("Location")
                if response.status not in _REDIRECTS or location is None:
                    return await self._read(response, label, budget)
                url = _http_url(str(url.join(_url(location, label))), label)
        raise InvalidArgument(f"{label} redirects more than {_MAX_REDIRECTS} times")

    async def _read(self, response: aiohttp.ClientResponse, label: str, budget: Budget) -> bytes:
        if is_refusal(response.status):
            raise InvalidArgument(f"{label}: its host answered {response.status}")
        if not 200 <= response.status < 300:
            raise ResourceUnreachable(f"{label}: its host answered {response.status}")
        if (response.content_length or 0) > self._max_bytes:
            raise self._too_large(label)
        parts: list[bytes] = []
        size = chunks = 0
        async for part, ends_chunk in response.content.iter_chunks():
            size += len(part)
            chunks += ends_chunk
            if size > self._max_bytes:
                raise self._too_large(label)
            if chunks > _MAX_CHUNKS:
                raise InvalidArgument(f"{label} arrives in more than {_MAX_CHUNKS} chunks")
            budget.take(len(part))
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _too_large(self, label: str) -> InvalidArgument:
        return InvalidArgument(f"{label} is larger than {self._max_bytes} bytes")


def _http_url(uri: str, label: str) -> URL:
    url = _url(uri, label)
    if url.scheme not in ("http", "https") or not url.host:
        raise InvalidArgument(f"{label} leads to {uris.redacted(uri)}, which is not an http url")
    return url


def _url(text: str, label: str) -> URL:
    try:
        url = URL(text)
        # yarl parses both only when they are read.
        _ = url.host, url.port
    except ValueError:
        raise InvalidArgument(f"{label}: bad url") from None
    return url


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "unknown host"
    if isinstance(error, aiohttp.ClientSSLError):
        return "TLS failed"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "cannot connect"
    return "the connection broke"
