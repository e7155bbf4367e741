"""HTTP sessions: one that connects to hosts, and with a proxy one that connects to the proxy alone."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from atserving import __version__
from evaluator.fetching.bounded_response import BoundedConnector
from evaluator.fetching.proxy import Proxy

CONNECTIONS = 256
_CONNECTIONS_PER_HOST = 16


class Sessions:
    """The sessions of a fetcher, for responses of at most ``max_bytes``."""

    def __init__(
        self,
        max_bytes: int,
        proxy: Proxy | None,
        timeout: aiohttp.ClientTimeout,
        resolver: AbstractResolver | None = None,
        **direct: Any,
    ) -> None:
        """``resolver`` and ``direct``, further options of its connector, are for connections to hosts alone."""
        self._limits = {"limit": CONNECTIONS, "limit_per_host": _CONNECTIONS_PER_HOST}
        self._max_bytes, self._timeout = max_bytes, timeout
        self._direct = self._open(resolver=resolver, **direct)
        self._proxy = proxy
        self._proxied: aiohttp.ClientSession | None = None
        if proxy:
            url = URL(proxy.url)
            if proxy.credentials:
                user, _, password = proxy.credentials.partition(":")
                url = url.with_user(user).with_password(password)
            self._proxied = self._open(url)

    def of(self, url: URL) -> aiohttp.ClientSession:
        """Return the session to fetch a URL with."""
        return self._proxied if self._proxied and self.is_proxied(url) else self._direct

    def is_proxied(self, url: URL) -> bool:
        """Return whether a URL is fetched through the proxy."""
        return self._proxy is not None and self._proxy.serves(url.raw_host or "")

    def _open(self, proxy: URL | None = None, **connector: Any) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=BoundedConnector(self._max_bytes, **self._limits, **connector),
            # Callers must not share cookies. Proxies and credentials of the environment are for others.
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            timeout=self._timeout,
            headers={"User-Agent": f"atserving/{__version__}", "Accept-Encoding": "identity"},
            proxy=proxy,
        )

    async def close(self) -> None:
        """Close all connections."""
        async with AsyncExitStack() as stack:
            for each in (self._direct, self._proxied):
                if each:
                    stack.push_async_callback(each.close)
