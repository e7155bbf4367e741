"""The fetches of a traced request: times, hosts, outcomes. Never paths and queries, which may be secret."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class Fetch:
    """One fetch of a resource, with its redirects. Times are of the monotonic clock."""

    __slots__ = ("began_s", "ended_s", "error", "headers", "hops", "size", "span_id", "status")

    def __init__(self, span_id: int, headers: Mapping[str, str] | None) -> None:
        self.span_id = span_id
        self.headers = headers
        """The headers that each host gets with it."""
        self.began_s = time.monotonic()
        self.ended_s = 0.0
        self.hops: list[tuple[float, str, str, int]] = []
        """The hosts that were asked: when, the scheme, the host and the port. All but the last redirected."""
        self.status = 0
        """The last host's status; 0: none has come."""
        self.size = 0
        self.error = ""
        """The name of the error that ended it."""

    def ask(self, scheme: str, host: str, port: int) -> None:
        """Take note that a host is asked next."""
        self.hops.append((time.monotonic(), scheme, host, port))
        self.status = 0


class Fetches:
    """The fetches of one request, in the order in which they began."""

    def __init__(self, begin: Callable[[], Fetch]) -> None:
        """Call ``begin`` for each."""
        self.all: list[Fetch] = []
        self._begin = begin

    @contextmanager
    def one(self) -> Iterator[Fetch]:
        """Take note of a fetch during the block, and of its end."""
        fetch = self._begin()
        self.all.append(fetch)
        try:
            yield fetch
        except BaseException as error:
            fetch.error = type(error).__name__
            raise
        finally:
            fetch.ended_s = time.monotonic()
