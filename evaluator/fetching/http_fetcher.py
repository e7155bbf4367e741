"""Fetches the resources of requests over HTTP, on one connection pool."""

from __future__ import annotations

import asyncio
import re
import socket
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import AsyncResolver
from async_lru import alru_cache
from yarl import URL

from atserving import hosts, uris
from atserving.errors import InvalidArgument, ResourceUnreachable
from atserving.uris import QiniuUri
from evaluator.fetching.addresses import AddressPolicy, AddressRefused
from evaluator.fetching.fetch_times import Fetch
from evaluator.fetching.host_rules import ANY, HostRules
from evaluator.fetching.proxy import Proxy
from evaluator.fetching.sessions import Sessions
from evaluator.fetching.statuses import REDIRECTS, is_refusal
from evaluator.limits import Budget, too_large

if TYPE_CHECKING:
    from evaluator.fetching.buckets import Buckets
    from evaluator.fetching.qiniu import QiniuConfig

_TOTAL_S = 10.0
_CONNECT_S = 3.0
_MAX_REDIRECTS = 3
# Tiny chunks cost far more to read than their bytes.
_MAX_CHUNKS = 1 << 16
# yarl passes these on, and a resolver would take such a name for one that it does not know.
_NO_HOST = re.compile(r"[\x00-\x20%\x7f]")
# How long to look a name up that the proxy is asked for, and for how long to remember it.
_LOOKUP_S, _KNOWN_S, _MOST_KNOWN = 1.0, 10.0, 1024


class PolicyResolver(AbstractResolver):
    """Resolves names. aiohttp connects to the returned addresses and resolves nothing a second time.

    Raises AddressRefused if the policy refuses any address of the name, or the rules refuse the name or an address.
    """

    def __init__(self, policy: AddressPolicy, resolver: AbstractResolver, rules: HostRules = ANY) -> None:
        self._policy = policy
        self._resolver = resolver
        self._rules = rules

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        results = await self._resolver.resolve(host, port, family)
        if not all(self._policy.allows(result["host"], port) for result in results):
            raise AddressRefused(host)
        self._rules.check(host, [result["host"] for result in results])
        return results

    async def close(self) -> None:
        await self._resolver.close()


class HttpFetcher:
    """Fetches resources of at most ``max_bytes`` each. Use it only on the event loop that opened it."""

    def __init__(
        self,
        max_bytes: int,
        policy: AddressPolicy,
        qiniu: QiniuConfig | None,
        resolver: AbstractResolver | None,
        proxy: Proxy | None = None,
        rules: HostRules = ANY,
    ) -> None:
        """Without ``qiniu``, refuse ``qiniu://`` URIs. ``resolver`` defaults to the DNS settings of this machine."""
        self._max_bytes = max_bytes
        self._policy, self._rules = policy, rules
        # Not in threads: lookups that get no reply would occupy all of them.
        self._resolver = PolicyResolver(policy, resolver or AsyncResolver(), rules)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
        self._sessions = Sessions(max_bytes, proxy, timeout, resolver=self._resolver, socket_factory=policy.socket)
        self._proxy_host = URL(proxy.url).raw_host if proxy else None
        self._is_checked = proxy is not None or rules != ANY
        self._known = alru_cache(maxsize=_MOST_KNOWN, ttl=_KNOWN_S)(self._look_up)
        self._buckets: Buckets | None = None
        if qiniu:
            # Imported here: few have keys.
            from evaluator.fetching.buckets import Buckets

            self._buckets = Buckets(qiniu, self._sessions)

    async def close(self) -> None:
        """Close all connections; cancel running lookups."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._resolver.close)
            stack.push_async_callback(self._sessions.close)
            stack.push_async_callback(self._known.cache_close)
            if self._buckets:
                stack.push_async_callback(self._buckets.close)

    async def fetch(self, uri: str, budget: Budget, one: Fetch | None = None) -> bytes:
        """Fetch a resource and take its bytes from ``budget``. ``one`` takes note of a traced request's fetch.

        Raises InvalidArgument for errors of the request and ResourceUnreachable for errors of a host.
        """
        label = f"resource {uris.redacted(uri)}"
        try:
            async with asyncio.timeout(_TOTAL_S):
                return await self._follow(await self._locate(uri, label), label, budget, one)
        except TimeoutError:
            raise ResourceUnreachable(f"{label} did not arrive within {_TOTAL_S:g} s") from None
        except AddressRefused as refused:
            raise InvalidArgument(f"{label} may not be fetched: {refused}") from None
        except aiohttp.InvalidURL:
            raise InvalidArgument(f"{label}: bad url") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ResourceUnreachable(f"{label} could not be reached: {_reason(error, self._proxy_host)}") from None

    async def _locate(self, uri: str, label: str) -> URL:
        if uris.scheme(uri) != "qiniu":
            return _http_url(uri, label)
        named = QiniuUri.parse(uri)
        if not self._buckets:
            raise InvalidArgument(f"{label}: qiniu resources are not set up for this app")
        if named.bucket not in self._buckets.open:
            raise InvalidArgument(f"{label}: requests may not read from this bucket")
        return await self._buckets.url(named, label)

    async def _follow(self, url: URL, label: str, budget: Budget, one: Fetch | None) -> bytes:
        headers = one.headers if one else None
        for _ in range(_MAX_REDIRECTS + 1):
            if self._is_checked:
                await self._check(url)
            if one:
                one.ask(url.scheme, url.raw_host or "", url.port or 0)
            async with self._sessions.of(url).get(url, allow_redirects=False, headers=headers) as response:
                if one:
                    one.status = response.status
                location = response.headers.get("Location")
                if response.status not in REDIRECTS or location is None:
                    body = await self._read(response, label, budget)
                    if one:
                        one.size = len(body)
                    return body
                url = _http_url(str(url.join(_url(location, label))), label)
        raise InvalidArgument(f"{label} redirects more than {_MAX_REDIRECTS} times")

    async def _check(self, url: URL) -> None:
        """Check the host of a URL that no resolver of ours will see: an address, or a name that the proxy resolves.

        Raises AddressRefused, InvalidURL.
        """
        host, port = hosts.normal(url.raw_host or ""), url.port or 0
        if hosts.address_of(host):
            if not self._policy.allows(host, port):
                raise AddressRefused(host)
            self._rules.check(host, [host])
        elif self._sessions.is_proxied(url):
            if hosts.ends_in_number(host):
                raise aiohttp.InvalidURL(host)
            await self._known(host, port)

    async def _look_up(self, host: str, port: int) -> None:
        """Check the addresses of a name as far as this machine knows them: the proxy may know others."""
        try:
            async with asyncio.timeout(_LOOKUP_S):
                await self._resolver.resolve(host, port)
        except (OSError, TimeoutError):
            self._rules.check(host, [])

    async def _read(self, response: aiohttp.ClientResponse, label: str, budget: Budget) -> bytes:
        if is_refusal(response.status):
            raise InvalidArgument(f"{label}: its host answered {response.status}")
        if not 200 <= response.status < 300:
            raise ResourceUnreachable(f"{label}: its host answered {response.status}")
        if (response.content_length or 0) > self._max_bytes:
            raise too_large(label, self._max_bytes)
        parts: list[bytes] = []
        size = chunks = 0
        async for part, ends_chunk in response.content.iter_chunks():
            size += len(part)
            chunks += ends_chunk
            if size > self._max_bytes:
                raise too_large(label, self._max_bytes)
            if chunks > _MAX_CHUNKS:
                raise InvalidArgument(f"{label} arrives in more than {_MAX_CHUNKS} chunks")
            budget.take(len(part))
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _http_url(uri: str, label: str) -> URL:
    url = _url(uri, label)
    if url.scheme not in ("http", "https") or not url.host:
        raise InvalidArgument(f"{label} leads to {uris.redacted(uri)}, which is not an http url")
    return url


def _url(text: str, label: str) -> URL:
    try:
        url = URL(text)
        # yarl parses both only when they are read. It raises IndexError for brackets in place of a host.
        host, _ = url.host, url.port
    except (ValueError, IndexError):
        raise InvalidArgument(f"{label}: bad url") from None
    if host and _NO_HOST.search(host):
        raise InvalidArgument(f"{label}: bad url")
    return url


def _reason(error: Exception, proxy_host: str | None) -> str:
    if proxy_host and isinstance(error, aiohttp.ClientConnectorError) and error.host == proxy_host:
        return "cannot connect to the proxy"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "unknown host"
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return f"the proxy answered {error.status}"
    if isinstance(error, aiohttp.ClientSSLError):
        return "TLS failed"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "cannot connect"
    return "the connection broke"
