"""Picks the instance for a request, by versions and phases, splits, free capacity and ejections.

A plain, synchronous class: config steps go in, routes and endpoints come out. Spec, section 2, ruling 1.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic

import structlog

from atserving import config, misplaced_rules
from atserving.config import (
    Acceptance,
    AppMetadata,
    AppRouting,
    ConfigValue,
    Instance,
    Release,
    Shadow,
    WorkerConfig,
)
from atserving.errors import NotFound, ResourceExhausted, ServingError, Unavailable
from gate.endpoint import ALONE, ConnectionT, Endpoint, Kind
from gate.limits import Limits
from gate.split import Split
from gate.usage import Usage
from gate.waiting import Waiting

log = structlog.get_logger()

LINGER_S = 30.0
"""How long the router remembers an instance that left the registry, as a last resort, at least: while its connection is
up, it does so."""

EJECT_S = 1.0
"""How long the router ejects an instance after its transport failed, unless the version has no other."""

_RETRY_UNREADY_S = 5.0
"""When to ask again for a version without a ready instance: a net takes seconds to load."""

# The least and the most that a refusal counts.
_FULL_S = (0.02, 1.0)

_NO_METADATA = AppMetadata()
_NO_ROUTING = AppRouting()


@dataclass(frozen=True)
class Route:
    """The config of requests for one app, or for one version of it.

    The router resolves a route once, and returns it until the config changes.
    """

    app: str
    version: str
    """Empty: the versions in production. Never an alias."""
    versions: tuple[str, ...]
    """The candidate versions: none if no version in production has a weight above 0."""
    split: Split | None
    """The turns of the candidates; None if the request names its version."""
    key_header: str
    """The header of the key by which an unversioned request keeps its version."""
    shadow: Shadow | None
    """The version that gets copies of these requests; None if none does."""
    timeout_s: float
    """The bound of one eval; for an unversioned request, the longest of the versions in production."""
    wait_s: float
    """How long a request waits for an instance while none is ready; for an unversioned one, as ``timeout_s``."""
    metadata: AppMetadata
    """The app's own access rules; empty if it has none."""
    default_metadata: AppMetadata
    limits: Limits | None
    """How much each caller may ask of the app; None: as much as they like."""


class Router(Generic[ConnectionT]):
    """Holds the routing table and picks from it.

    ``connect`` opens the connection to an instance, with the first request for its version: a large mesh has far more
    instances than a gate needs. :meth:`idle` and :meth:`expired` return connections for the caller to close.

    The router does not forget an instance as soon as it leaves the registry, since its lease may only have expired
    while etcd, every registry, or the instance's way to them was away. The instance remains a last resort while its
    version has no other, until it refuses a request itself, or its connection is down and LINGER_S have passed.

    An instance that has loaded other content than its release has now takes no request. One that is away takes requests
    only if no other has room.
    """

    def __init__(
        self,
        connect: Callable[[Instance], ConnectionT],
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._connect = connect
        self._clock = clock
        self._random = rng or random.Random()  # noqa: S311 - it spreads load
        self._releases: dict[str, dict[str, Release]] = {}
        self._endpoints: dict[tuple[str, str], dict[str, Endpoint[ConnectionT]]] = {}
        self._left: dict[tuple[str, str], dict[str, Endpoint[ConnectionT]]] = {}
        # Registered, but with other content than their release has now; they may fit again.
        self._outdated: dict[tuple[str, str], dict[str, Endpoint[ConnectionT]]] = {}
        self._settings: dict[str, AppMetadata | AppRouting | WorkerConfig] = {}
        # Access rules under an unknown key, and the apps that it closes.
        self._misplaced: dict[str, tuple[str, ...]] = {}
        # The turns of each app's versions in production; valid until their weights change.
        self._splits: dict[str, Split] = {}
        self._usage = Usage(clock)
        # Resolved from the releases and settings; valid until the config changes.
        self._routes: dict[tuple[str, str], Route] = {}
        self._dropped: list[Endpoint[ConnectionT]] = []
        self.waiting = Waiting()
        """The requests that wait for an instance. A step of the config wakes them."""

    def apply(self, upserts: Mapping[str, ConfigValue], deletes: Set[str]) -> None:
        """Apply one step of the config, as :class:`atserving.follower.ConfigFollower` reports it."""
        self._routes.clear()
        for key in deletes:
            self._delete(key)
        # Instances last, since a release decides on its instances.
        for key, value in sorted(upserts.items(), key=lambda each: isinstance(each[1], Instance)):
            if isinstance(value, Release):
                self._releases.setdefault(value.name, {})[value.version] = value
                self._compare(value)
            elif isinstance(value, Instance):
                self._enter(value)
            elif isinstance(value, AppMetadata) and not config.is_access_rules(key):
                self._misplaced[key] = misplaced_rules.apps_of(key)
            elif not isinstance(value, Acceptance):
                self._settings[key] = value
        if self.waiting:
            self.waiting.wake([*upserts, *deletes])

    def _delete(self, key: str) -> None:
        self._settings.pop(key, None)
        self._misplaced.pop(key, None)
        match key.removeprefix(config.PREFIX).split("/"):
            case ["eval", app, version]:
                versions = self._releases.get(app, {})
                versions.pop(version, None)
                if not versions:
                    self._releases.pop(app, None)
                    self._splits.pop(app, None)
            case ["instance", app, version, id_]:
                if outdated := self._outdated.get((app, version), {}).pop(id_, None):
                    self._dropped.append(outdated)
                endpoint = self._endpoints.get((app, version), {}).pop(id_, None)
                if endpoint:
                    endpoint.left_at = self._clock()
                    self._left.setdefault((app, version), {})[id_] = endpoint

    def _enter(self, instance: Instance) -> None:
        key = (instance.app, instance.version)
        known = self._endpoints.setdefault(key, {})
        pools = (known, self._left.get(key, {}), self._outdated.get(key, {}))
        endpoint = next((found for pool in pools if (found := pool.pop(instance.id, None))), None)
        if endpoint and endpoint.instance.address != instance.address:
            self._dropped.append(endpoint)
            endpoint = None
        if endpoint:
            endpoint.instance, endpoint.left_at = instance, None
        else:
            endpoint = Endpoint(instance, self._connect)
            if key in self._usage:
                endpoint.open()
        known[instance.id] = endpoint
        release = self._releases.get(instance.app, {}).get(instance.version)
        if release and not instance.serves(release):
            self._set_aside(known.pop(instance.id))

    def _compare(self, release: Release) -> None:
        """Use the instances that have loaded this content of a version, and no others."""
        key = (release.name, release.version)
        digest = release.digest
        known = self._endpoints.setdefault(key, {})
        left, outdated = self._left.get(key, {}), self._outdated.get(key, {})
        for id_ in [id_ for id_, each in outdated.items() if each.instance.digest == digest]:
            known[id_] = outdated.pop(id_)
            log.info("instance current", instance=id_, app=release.name, version=release.version)
        for id_ in [id_ for id_, each in known.items() if each.instance.digest not in ("", digest)]:
            self._set_aside(known.pop(id_))
        for id_ in [id_ for id_, each in left.items() if each.instance.digest not in ("", digest)]:
            self._dropped.append(left.pop(id_))

    def _set_aside(self, endpoint: Endpoint[ConnectionT]) -> None:
        instance = endpoint.instance
        self._outdated.setdefault((instance.app, instance.version), {})[instance.id] = endpoint
        log.warning("instance outdated", instance=instance.id, app=instance.app, version=instance.version)

    def route(self, app: str, version: str) -> Route:
        """Return the route of a request, whose version may be an alias. Raises NotFound for an unknown app or version.

        The router caches routes of existing apps, versions and aliases only: made-up names cannot grow the cache.
        """
        route = self._routes.get((app, version))
        if route is None:
            route = self._routes[app, version] = self._resolve(app, version)
        return route

    def _resolve(self, app: str, version: str) -> Route:
        releases = self._releases.get(app)
        if not releases:
            raise NotFound(f"unknown app {app!r}")
        routing = self._settings.get(config.app_routing_key(app))
        routing = routing if isinstance(routing, AppRouting) else _NO_ROUTING
        if version and version not in releases:
            version = _aliased(app, version, routing, releases)
        split = None if version else self._split(app, releases)
        named = (version,) if version else tuple(split.weights if split else ())
        own, default = self.rules(app)
        workers = [self._worker(app, each) for each in named or [""]]
        return Route(
            app,
            version,
            split.versions if split else named,
            split,
            routing.key_header or config.DEFAULT_KEY_HEADER,
            _shadow(routing, releases) if split else None,
            max(_seconds(each.timeout) for each in workers),
            max(_seconds(each.wait_for_instance) for each in workers),
            own,
            default,
            Limits.of(own, default),
        )

    def _split(self, app: str, releases: Mapping[str, Release]) -> Split:
        weights = {each.version: each.weight for each in releases.values() if each.phase == "production"}
        split = self._splits.get(app)
        if split is None or split.weights != weights:
            split = self._splits[app] = Split(app, weights)
        return split

    def digest(self, app: str, version: str) -> str:
        """Return the digest of a version's content; empty for an unknown version."""
        release = self._releases.get(app, {}).get(version)
        return release.digest if release else ""

    def versions(self, app: str) -> Collection[str]:
        """Return the versions of an app; none for an unknown one."""
        return self._releases.get(app, {}).keys()

    def instances(self, app: str, version: str) -> Collection[str]:
        """Return the ids of a version's registered instances."""
        return self._endpoints.get((app, version), {}).keys() | self._outdated.get((app, version), {}).keys()

    def shares(self, app: str) -> dict[str, float]:
        """Return the share of each version in the app's last split; none if no request without a version has come."""
        split = self._splits.get(app)
        return split.shares() if split else {}

    def states(self, app: str, version: str) -> Counter[str]:
        """Return how many instances of a version are in which state, of ``gate.endpoint.STATES``."""
        key, now_s = (app, version), self._clock()
        states = Counter(each.state(now_s) for each in self._endpoints.get(key, {}).values())
        states["outdated"] = len(self._outdated.get(key, ()))
        states["left"] = len(self._left.get(key, ()))
        return states

    def rules(self, app: str) -> tuple[AppMetadata, AppMetadata]:
        """Return the access rules of an app, which need not exist, and the default ones."""
        return self._metadata(config.app_metadata_key(app), app), self._metadata(config.DEFAULT_APP_METADATA_KEY, "")

    def _metadata(self, key: str, app: str) -> AppMetadata:
        if self._misplaced and any(app in closed for closed in self._misplaced.values()):
            return config.CLOSED
        value = self._settings.get(key)
        return value if isinstance(value, AppMetadata) else _NO_METADATA

    def _worker(self, app: str, version: str) -> WorkerConfig:
        merged = config.DEFAULT_WORKER
        for key in reversed(config.worker_keys(app, version)):
            value = self._settings.get(key)
            if isinstance(value, WorkerConfig):
                merged = value.over(merged)
        return merged

    def pick(
        self,
        route: Route,
        tried: Collection[Endpoint[ConnectionT]] = (),
        kind: Kind = ALONE,
        key: bytes = b"",
        turn: str = "",
    ) -> Endpoint[ConnectionT]:
        """Return the instance that takes a request, but none of those that were ``tried``.

        A ``key`` decides on the version; without one, the versions take turns. ``turn`` is the version in whose turn
        the request is already. Of a version's instances, the one with the smallest share of its capacity in flight
        takes the request. An instance that is away is a last resort.

        Raises Unavailable (no instance is ready, or all were tried) or ResourceExhausted (all ready ones are full).
        """
        if not tried and (only := self._only(route, kind)):
            return only
        versions = route.versions
        if key and route.split:
            versions = self._of_key(route, key, tried, kind)
        ready = [self._ready(route.app, version, tried, away=False) for version in versions]
        rooms = [[each for each in found if self._room(each, kind)] for found in ready]
        if not any(rooms) and self._has_away(route.app, versions):
            with_away = [self._ready(route.app, version, tried, away=True) for version in versions]
            rooms = [[each for each in found if self._room(each, kind)] for found in with_away]
            ready = ready if any(ready) else with_away
        if not any(rooms):
            raise self._none_free(route, versions, is_full=any(ready))
        if len(versions) == 1 or not route.split:
            candidates = rooms[0]
        elif not turn:
            capacities = [sum([each.instance.capacity for each in found]) for found in ready]
            candidates = rooms[route.split.take(capacities, rooms)]
        else:
            kept = versions.index(turn) if turn in versions else -1
            candidates = rooms[kept if kept >= 0 and rooms[kept] else route.split.due(rooms)]
        if len(candidates) == 1:
            return candidates[0]
        shares = [(each.used(kind) + 1) / each.instance.capacity for each in candidates]
        least = min(shares)
        return self._random.choice([each for each, share in zip(candidates, shares, strict=True) if share == least])

    def spare(
        self, route: Route, tried: Sequence[Endpoint[ConnectionT]], kind: Kind, key: bytes = b""
    ) -> Endpoint[ConnectionT] | None:
        """Return an instance, none of those ``tried``, that serves and is at most half full; None if there is none."""
        version = tried[-1].instance.version
        try:
            endpoint = self.pick(route, tried, kind, key, version)
        except ServingError:
            return None
        if endpoint.is_away or endpoint.ejected_until > self._clock():
            return None
        if key and route.split and endpoint.instance.version != version:
            return None
        return endpoint if 2 * endpoint.used(kind) <= endpoint.instance.capacity else None

    def _of_key(
        self, route: Route, key: bytes, tried: Collection[Endpoint[ConnectionT]], kind: Kind
    ) -> tuple[str, ...]:
        """Return the version that a key prefers among those with a ready instance; full ones count as ready."""
        assert route.split, "only unversioned requests have keys"
        preferred = route.split.of_key(key)
        for away in (False, True):
            for version in preferred:
                found = self._ready(route.app, version, (), away)
                if any(each not in tried or not self._room(each, kind) for each in found):
                    return (version,)
        return tuple(preferred[:1])

    def _has_away(self, app: str, versions: Collection[str]) -> bool:
        pools = [pool.get((app, version), {}) for pool in (self._endpoints, self._left) for version in versions]
        return any(each.is_away for pool in pools for each in pool.values())

    def _room(self, endpoint: Endpoint[ConnectionT], kind: Kind) -> int:
        full_until = max(endpoint.full_until, endpoint.batches_full_until if kind.batched else 0.0)
        if full_until and not kind.fetches and full_until > self._clock():
            return 0
        return endpoint.room(kind)

    def _only(self, route: Route, kind: Kind) -> Endpoint[ConnectionT] | None:
        """Return the instance if there is only one to pick, as for most apps, and it has room and is not away."""
        if len(route.versions) != 1:
            return None
        pool = self._endpoints.get((route.app, route.versions[0]), {})
        if len(pool) != 1:
            return None
        (endpoint,) = pool.values()
        return endpoint if self._room(endpoint, kind) and not endpoint.is_away else None

    def _ready(
        self, app: str, version: str, tried: Collection[Endpoint[ConnectionT]], away: bool
    ) -> list[Endpoint[ConnectionT]]:
        for pool in (self._endpoints, self._left):
            found = [each for each in pool.get((app, version), {}).values() if each not in tried]
            if not away:
                found = [each for each in found if not each.is_away]
            if found:
                now = self._clock()
                return [each for each in found if each.ejected_until <= now] or found
        return []

    def _none_free(self, route: Route, versions: tuple[str, ...], *, is_full: bool) -> ServingError:
        if not versions:
            why = " with a weight above 0" if route.split and route.split.weights else ""
            return Unavailable(f"app {route.app!r} has no version in production{why}", refusal="unready")
        one = len(versions) == 1 and versions != route.versions
        what = f"app {route.app!r}"
        if route.version or one:
            what = f"version {versions[0]!r} of {what}" + (", which has this key," if one else "")
        if is_full:
            return ResourceExhausted(f"every instance of {what} is full", retry_after_s=1.0, refusal="full")
        outdated = sum(len(self._outdated.get((route.app, version), ())) for version in versions)
        why = f"; {outdated} have loaded other content than the release has now" if outdated else ""
        return Unavailable(f"no instance of {what} is ready{why}", retry_after_s=_RETRY_UNREADY_S, refusal="unready")

    def failed(self, endpoint: Endpoint[ConnectionT]) -> None:
        """Eject an endpoint whose transport failed; drop it if it had left the registry."""
        endpoint.ejected_until = self._clock() + EJECT_S
        self.refused(endpoint)

    def refused(self, endpoint: Endpoint[ConnectionT], kind: Kind = ALONE, full_s: float = 0.0) -> None:
        """Drop an endpoint that refused a request, if it had left the registry.

        A full one, which needs ``full_s`` for all that it has, gets no request until about one of those is done.
        """
        if full_s and not kind.fetches:
            each_s = min(max(full_s / endpoint.instance.capacity, _FULL_S[0]), _FULL_S[1])
            if kind.batched:
                endpoint.batches_full_until = self._clock() + each_s
            else:
                endpoint.full_until = self._clock() + each_s
        left = self._left.get((endpoint.instance.app, endpoint.instance.version), {})
        if left.get(endpoint.instance.id) is endpoint:
            self._dropped.append(left.pop(endpoint.instance.id))

    def warm(self, endpoint: Endpoint[ConnectionT]) -> None:
        """Open the connections to all instances of a version, as one of them is needed now.

        The next requests find them open, and a gate knows of an instance that it can't reach before it asks it.
        """
        key = (endpoint.instance.app, endpoint.instance.version)
        self._usage.begin(key, self._endpoints.get(key, {}).values())

    def idle(self) -> list[ConnectionT]:
        """Return the connections of versions that have had no request for a while, for the caller to close."""
        unused = self._usage.ended(lambda key: self._endpoints.get(key, {}).values())
        pools = (pool.get(key, {}) for key in unused for pool in (self._endpoints, self._outdated))
        taken = (each.take_connection() for pool in pools for each in pool.values())
        return [connection for connection in taken if connection]

    def expired(self) -> list[Endpoint[ConnectionT]]:
        """Return the endpoints that are no longer used, each once, as soon as they have no request in flight."""
        oldest = self._clock() - LINGER_S
        for pool in self._left.values():
            for id_, each in list(pool.items()):
                if each.left_at is not None and each.left_at < oldest and not each.is_up:
                    self._dropped.append(pool.pop(id_))
        idle = [each for each in self._dropped if each.is_idle]
        self._dropped = [each for each in self._dropped if not each.is_idle]
        return idle


def _seconds(duration: timedelta | None) -> float:
    assert duration is not None, "the default config has all durations"
    return duration.total_seconds()


def _shadow(routing: AppRouting, releases: Mapping[str, Release]) -> Shadow | None:
    """Return the shadow if it is a version in staging."""
    shadow = routing.shadow
    release = releases.get(shadow.version) if shadow else None
    return shadow if shadow and shadow.percent and release and release.phase == "staging" else None


def _aliased(app: str, alias: str, routing: AppRouting, releases: Mapping[str, Release]) -> str:
    """Return the version that an alias names. Raises NotFound."""
    version = routing.aliases.get(alias)
    if version is None:
        raise NotFound(f"app {app!r} has no version {alias!r}")
    if version not in releases:
        raise NotFound(f"app {app!r} has no version {version!r}, which its alias {alias!r} names")
    return version
