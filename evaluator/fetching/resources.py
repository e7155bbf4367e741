"""Provides the resources of requests: the bytes of a data URI, or those that a host has for a URI."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from atserving import lifecycle, uris
from atserving.errors import ResourceUnreachable
from atserving.v1 import serving_pb2
from evaluator.fetching.addresses import AddressPolicy
from evaluator.fetching.fetch_times import Fetch, Fetches
from evaluator.fetching.host_rules import ANY, HostRules
from evaluator.fetching.proxy import Proxy
from evaluator.limits import Budget, decode

if TYPE_CHECKING:
    from aiohttp.abc import AbstractResolver

    from evaluator.fetching.http_fetcher import HttpFetcher
    from evaluator.fetching.qiniu import QiniuConfig

# A request may fetch so many resources at a time. All requests together have so many fetches beside the first of each,
# so that connections are left for the first.
_AT_A_TIME, _MOST_MORE = 16, 128
# More than the time limit of a fetch, which is in the module that is loaded late.
_LONGEST_FETCH_S = 15.0


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
        proxy: Proxy | None = None,
    ) -> None:
        """Without ``qiniu``, refuse ``qiniu://`` URIs. ``resolver`` defaults to the DNS settings of this machine."""
        self._max_bytes = max_bytes
        self._settings = policy, qiniu, resolver, proxy
        self._rules = ANY
        self._http: HttpFetcher | None = None
        self._opening: asyncio.Task[HttpFetcher] | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._more = _MOST_MORE

    async def __aenter__(self) -> ResourceFetcher:
        return self

    async def __aexit__(self, *_: object) -> None:
        await lifecycle.end(self._retiring)
        if self._opening:
            await _close(self._opening)

    def restrict(self, rules: HostRules) -> None:
        """Let later fetches follow other rules."""
        if rules == self._rules:
            return
        self._rules = rules
        if self._opening:
            # Its connections were made under the old rules: nobody may use them again.
            task = asyncio.create_task(_retire(self._opening))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        self._http = self._opening = None

    async def replace(
        self, resources: Sequence[serving_pb2.Resource], budget: Budget, fetches: Fetches | None = None
    ) -> None:
        """Replace the URIs of a request's resources by their bytes, several at a time. Raises as :meth:`fetch` does."""
        more = min(len(resources) - 1, _AT_A_TIME - 1, self._more)
        left = iter(resources)
        if more < 1:
            await self._replace_each(left, budget, fetches)
            return
        self._more -= more
        tasks = [asyncio.create_task(self._replace_each(left, budget, fetches)) for _ in range(1 + more)]
        try:
            await asyncio.gather(*tasks)
        finally:
            # If one failed, the others are of no use. Its error refers to this frame, and would keep what they have.
            await lifecycle.end(tasks)
            tasks.clear()
            self._more += more

    async def _replace_each(
        self, left: Iterable[serving_pb2.Resource], budget: Budget, fetches: Fetches | None
    ) -> None:
        for each in left:
            if fetches and uris.scheme(each.uri) != "data":
                with fetches.one() as one:
                    each.body = await self.fetch(each.uri, budget, one)
            else:
                each.body = await self.fetch(each.uri, budget)

    async def fetch(self, uri: str, budget: Budget | None = None, one: Fetch | None = None) -> bytes:
        """Fetch a resource and take its bytes from ``budget``, the request's (None: this is its only resource).

        ``one`` takes note of a traced request's fetch.
        Raises InvalidArgument for errors of the request and ResourceUnreachable for errors of a host.
        """
        budget = budget or Budget(self._max_bytes)
        if uris.scheme(uri) == "data":
            return decode(uri, self._max_bytes, budget)
        if not self._http:
            self._opening = opening = self._opening or asyncio.create_task(self._open())
            try:
                http = await asyncio.shield(opening)
            except (OSError, ImportError) as error:
                # The next request tries again: files may have been short.
                self._opening = None
                raise ResourceUnreachable(f"the HTTP client could not be loaded: {error}") from None
            if self._opening is opening:
                self._http = http
            return await http.fetch(uri, budget, one)
        return await self._http.fetch(uri, budget, one)

    async def _open(self) -> HttpFetcher:
        # In a thread, so that other requests go on.
        module = await asyncio.to_thread(importlib.import_module, "evaluator.fetching.http_fetcher")
        http: HttpFetcher = module.HttpFetcher(self._max_bytes, *self._settings, self._rules)
        return http


async def _retire(opening: asyncio.Task[HttpFetcher]) -> None:
    """Close an HTTP client once its last fetch has ended."""
    try:
        await asyncio.sleep(_LONGEST_FETCH_S)
    finally:
        await _close(opening)


async def _close(opening: asyncio.Task[HttpFetcher]) -> None:
    await asyncio.wait({opening})
    if not opening.exception():
        await opening.result().close()
