"""Counts a gate's requests by app and version, in plain numbers; ``gate.request_metrics`` shows them at a scrape.

Only apps that the config has get counts of their own, so made-up names cannot grow them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection

from atserving.counts import Distribution, latency_bounds
from atserving.errors import (
    InvalidArgument,
    NotFound,
    PayloadTooLarge,
    PermissionDenied,
    ServingError,
    Unauthenticated,
    UnsupportedMediaType,
)

SECONDS = latency_bounds(0.001)
"""The upper bounds of the buckets of latencies."""

GONE_S = 600.0
"""How long the counts of an app or version stay after the config has lost it."""

MOST_APPS = 1000
"""How many apps have counts of their own. Those beyond count as one, with the unknown ones."""

MOST_INSTANCES = 4000
"""How many instances have counts of their own. Those beyond count as one of their version, without a name."""

REFUSALS = (
    "unknown",
    "unauthenticated",
    "denied",
    "malformed",
    "limit",
    "turns",
    "full",
    "unready",
    "memory",
    "starting",
)
"""Why a gate refuses requests."""

RETRIES = ("unreachable", "lost", "full", "away", "refused", "hedge")
"""Why a gate asks one more instance for a request."""

LEFT = 499
"""The code of a request whose caller has left."""

_BY_STATUS = {
    NotFound.status: "unknown",
    Unauthenticated.status: "unauthenticated",
    PermissionDenied.status: "denied",
    InvalidArgument.status: "malformed",
    PayloadTooLarge.status: "malformed",
    UnsupportedMediaType.status: "malformed",
}
_SWEEP_S = 60.0


def refusal_of(error: ServingError) -> str:
    """Return why the gate has refused a request; empty if an instance, or the loss of instances, is the reason."""
    if error.refusal or error.version:
        return error.refusal
    return "limit" if error.limit else _BY_STATUS.get(error.status, "")


class VersionCounts:
    """The counts of one version of an app."""

    __slots__ = ("by_turn", "codes", "instances_s", "known_s", "picks", "waiting", "without_instance")

    def __init__(self, known_s: float) -> None:
        self.codes: dict[int, int] = {}
        """Requests by their HTTP status."""
        self.picks: dict[str, int] = {}
        """How often each of its instances was asked, by its id; empty for all beyond MOST_INSTANCES."""
        self.instances_s: dict[str, float] = {}
        """When each of those was last seen to be registered."""
        self.by_turn = 0
        """Requests without a version that it has answered."""
        self.without_instance = self.waiting = 0
        """Requests that found no ready instance of it, and those that wait for one now."""
        self.known_s = known_s


class _Room:
    """How many more instances may have counts of their own."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left


class AppCounts:
    """The counts of one app, or of all unknown ones."""

    __slots__ = (
        "_room",
        "in_flight",
        "known_s",
        "refusals",
        "retries",
        "times",
        "versions",
    )

    def __init__(self, known_s: float, room: _Room) -> None:
        self._room = room
        self.in_flight = 0
        """Requests that the gate has admitted, and that have no answer yet."""
        self.versions: dict[str, VersionCounts] = {}
        """By version; empty for requests that no version has had."""
        self.refusals: Counter[str] = Counter()
        self.retries: Counter[str] = Counter()
        self.times = Distribution(SECONDS)
        """The seconds of requests that were not refused."""
        self.known_s = known_s
        """When the config was last seen to have the app."""

    def of(self, version: str) -> VersionCounts:
        """Return the counts of a version."""
        counts = self.versions.get(version)
        if counts is None:
            counts = self.versions[version] = VersionCounts(self.known_s)
        return counts

    def count(self, version: str, status: int) -> None:
        """Count a request at its end."""
        codes = self.of(version).codes
        codes[status] = codes.get(status, 0) + 1

    def picked(self, version: str, instance: str) -> None:
        """Count an attempt at an instance."""
        picks = self.of(version).picks
        if instance not in picks:
            instance = self._admitted(instance)
        picks[instance] = picks.get(instance, 0) + 1

    def _admitted(self, instance: str) -> str:
        """Return the name by which a new instance counts."""
        if not self._room.left:
            return ""
        self._room.left -= 1
        return instance

    def forget_instances(self, version: str, registered: Collection[str], now_s: float, after_s: float) -> None:
        """Drop the counts of a version's instances that have not been registered for so long."""
        counts = self.versions[version]
        for each in list(counts.picks):
            if not each or each in registered:
                counts.instances_s[each] = now_s
            elif now_s - counts.instances_s.setdefault(each, now_s) >= after_s:
                del counts.picks[each], counts.instances_s[each]
                self._room.left += 1

    def forget(self, version: str) -> None:
        """Drop the counts of a version."""
        self._room.left += sum(map(bool, self.versions.pop(version).picks))

    def took(self, seconds: float, traceparent: str | None) -> None:
        """Count the time of a request, and keep the trace of the slowest."""
        self.times.observe(seconds)
        self.times.trace(seconds, traceparent)


class _UnknownCounts(AppCounts):
    """The counts of all apps without counts of their own, and of all their versions together."""

    __slots__ = ()

    def of(self, version: str) -> VersionCounts:
        return super().of("")


class RequestCounts:
    """The counts of all requests."""

    def __init__(
        self,
        versions: Callable[[str], Collection[str]],
        instances: Callable[[str, str], Collection[str]] = lambda _, __: (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``versions`` returns those of an app that the config has, ``instances`` the ids of a version's instances."""
        self._versions = versions
        self._instances = instances
        self._clock = clock
        self._room = _Room(MOST_INSTANCES)
        self._unknown = _UnknownCounts(clock(), _Room(0))
        self._apps: dict[str, AppCounts] = {}
        self._swept_s = self._tidied_s = clock()

    def of(self, app: str) -> AppCounts:
        """Return the counts of an app."""
        return self._apps.get(app) or self._new(app)

    def _new(self, app: str) -> AppCounts:
        if not self._versions(app):
            return self._unknown
        now_s = self._clock()
        if len(self._apps) >= MOST_APPS and now_s - self._swept_s >= _SWEEP_S:
            self._swept_s = now_s
            self._forget(now_s, 0.0)
        if len(self._apps) >= MOST_APPS:
            return self._unknown
        counts = self._apps[app] = AppCounts(now_s, self._room)
        return counts

    def refused(self, app: str, status: int, reason: str) -> None:
        """Count a request that was refused before it became an eval."""
        counts = self.of(app)
        counts.count("", status)
        if reason:
            counts.refusals[reason] += 1

    def all(self) -> list[tuple[str, AppCounts]]:
        """Return the counts of each app; those of the unknown ones have an empty name."""
        self._forget(self._clock(), GONE_S)
        return [("", self._unknown), *self._apps.items()]

    def tidy(self) -> None:
        """Drop what the config has not had for a while, as a scrape does. Call it in case nobody scrapes."""
        now_s = self._clock()
        if now_s - self._tidied_s >= _SWEEP_S:
            self._tidied_s = now_s
            self._forget(now_s, GONE_S)

    def _forget(self, now_s: float, after_s: float) -> None:
        """Drop what the config has not had for so long."""
        for app, counts in list(self._apps.items()):
            known = self._versions(app)
            if known:
                counts.known_s = now_s
            elif now_s - counts.known_s >= after_s:
                for version in list(counts.versions):
                    counts.forget(version)
                del self._apps[app]
                continue
            for version, each in list(counts.versions.items()):
                if not version or version in known:
                    each.known_s = now_s
                elif now_s - each.known_s >= after_s:
                    counts.forget(version)
                    continue
                if each.picks:
                    counts.forget_instances(version, self._instances(app, version), now_s, after_s)
