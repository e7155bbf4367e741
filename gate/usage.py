"""Which versions have had requests lately: only the connections to their instances are open."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from gate.endpoint import Endpoint

IDLE_S = 300.0
"""How long the connections to the instances of a version stay open without a request for it."""

Version = tuple[str, str]
"""An app, and a version of it."""


class _Use(NamedTuple):
    """The requests that the instances of a version have had, and since when there were no more."""

    requests: int
    since_s: float


class Usage:
    """The versions in use."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._used: dict[Version, _Use] = {}

    def __contains__(self, version: Version) -> bool:
        return version in self._used

    def begin(self, version: Version, instances: Collection[Endpoint[Any]]) -> None:
        """Open the connections to the instances of a version, which is in use from now on."""
        self._used[version] = _Use(_requests(instances), self._clock())
        for each in instances:
            each.open()

    def ended(self, instances_of: Callable[[Version], Collection[Endpoint[Any]]]) -> list[Version]:
        """Return the versions that are no longer in use, each once."""
        now_s = self._clock()
        ended: list[Version] = []
        for version, use in list(self._used.items()):
            instances = instances_of(version)
            requests = _requests(instances)
            if requests != use.requests or not all(each.is_idle for each in instances):
                self._used[version] = _Use(requests, now_s)
            elif now_s - use.since_s >= IDLE_S:
                del self._used[version]
                ended.append(version)
        return ended


def _requests(instances: Collection[Endpoint[Any]]) -> int:
    return sum(each.requests for each in instances)
