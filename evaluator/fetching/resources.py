"""Provides the resources of requests: the bytes of a data URI, or those that a host has for a URI."""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING

from atserving import uris
from atserving.errors import ResourceUnreachable
from evaluator.fetching.addresses import AddressPolicy
from evaluator.limits import Budget, decode

if TYPE_CHECKING:
    from aiohttp.abc import AbstractResolver

    from evaluator.fetching.http_fetcher import HttpFetcher
    from evaluator.fetching.qiniu import QiniuConfig


class ResourceFetcher:
    """Fetches resources of at most ``max_bytes`` each.

    An async context manager. Use it only on the event loop that entered it. The HTTP client costs 10 MB and some tenths
    of a second, so it is loaded when the first request needs it.
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
        self._settings = policy, qiniu, resolver
        self._http: HttpFetcher | None = None
        self._opening: asyncio.Task[HttpFetcher] | None = None

    async def __aenter__(self) -> ResourceFetcher:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._opening:
            await asyncio.wait({self._opening})
            if not self._opening.exception():
                await self._opening.result().close()

    async def fetch(self, uri: str, budget: Budget | None = None) -> bytes:
        """Fetch a resource and take its bytes from ``budget``, the request's (None: this is its only resource).

        Raises InvalidArgument for errors of the request and ResourceUnreachable for errors of a host.
        """
        budget = budget or Budget(self._max_bytes)
        if uris.scheme(uri) == "data":
            return decode(uri, self._max_bytes, budget)
        if not self._http:
            self._opening = opening = self._opening or asyncio.create_task(self._open())
            try:
                self._http = await asyncio.shield(opening)
            except (OSError, ImportError) as error:
                # The next request tries again: files may have been short.
                self._opening = None
                raise ResourceUnreachable(f"the HTTP client could not be loaded: {error}") from None
        return await self._http.fetch(uri, budget)

    async def _open(self) -> HttpFetcher:
        # In a thread, so that other requests go on.
        module = await asyncio.to_thread(importlib.import_module, "evaluator.fetching.http_fetcher")
        http: HttpFetcher = module.HttpFetcher(self._max_bytes, *self._settings)
        return http
