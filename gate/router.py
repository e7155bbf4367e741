"""Which instance answers a request: versions and phases, weights, free capacity, and instances that have left.

A plain, synchronous class: config steps go in, endpoints come out. Spec, section 2, ruling 1.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Generic, TypeVar

from atserving import config
from atserving.config import AppMetadata, ConfigValue, Instance, Release, WorkerConfig
from atserving.errors import NotFound, ResourceExhausted, ServingError, Unavailable

LINGER_S = 30.0
"""How long an instance that left the registry is remembered, as a last resort."""

SHUN_S = 1.0
"""How long an instance whose transport failed is passed over, where there is another."""

_NO_METADATA = AppMetadata()

ConnectionT = TypeVar("ConnectionT")


@dataclass(eq=False)
class Endpoint(Generic[ConnectionT]):
    """An instance as this gate sees it."""

    instance: Instance
    connection: ConnectionT
    in_flight: int = 0
    shunned_until: float = 0.0
    left_at: float | None = field(default=None)
    """When the registry said that it is gone; None while it is registered."""

    @property
    def free(self) -> int:
        """How many more requests of this gate it takes."""
        return max(self.instance.capacity - self.in_flight, 0)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Counts a request in flight."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1


class Router(Generic[ConnectionT]):
    """Holds the routing table and picks from it.

    ``connect`` makes the connection of an instance when it appears; connections that :meth:`expired` hands back are the
    caller's to close.

    An instance that leaves the registry is not forgotten at once. Its lease may merely have run out while etcd or every
    registry was away, so it goes on as a last resort, while its version has no other, until it refuses a request itself
    or LINGER_S have passed.
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
        self._settings: dict[str, AppMetadata | WorkerConfig] = {}
        # What is merged from the settings, until a step of the config changes something.
        self._timeouts: dict[tuple[str, str], timedelta] = {}
        self._dropped: list[Endpoint[ConnectionT]] = []

    def apply(self, upserts: Mapping[str, ConfigValue], deletes: Set[str]) -> None:
        """One step of the config, as :class:`atserving.follower.ConfigFollower` reports it."""
        self._timeouts.clear()
        for key in deletes:
            self._delete(key)
        for key, value in upserts.items():
            if isinstance(value, Release):
                self._releases.setdefault(value.name, {})[value.version] = value
            elif isinstance(value, Instance):
                self._enter(value)
            else:
                self._settings[key] = value

    def _delete(self, key: str) -> None:
        self._settings.pop(key, None)
        match key.removeprefix(config.PREFIX).split("/"):
            case ["eval", app, version]:
                versions = self._releases.get(app, {})
                versions.pop(version, None)
                if not versions:
                    self._releases.pop(app, None)
            case ["instance", app, version, id_]:
                endpoint = self._endpoints.get((app, version), {}).pop(id_, None)
                if endpoint:
                    endpoint.left_at = self._clock()
                    self._left.setdefault((app, version), {})[id_] = endpoint

    def _enter(self, instance: Instance) -> None:
        place = (instance.app, instance.version)
        known = self._endpoints.setdefault(place, {})
        endpoint = known.pop(instance.id, None) or self._left.get(place, {}).pop(instance.id, None)
        if endpoint and endpoint.instance.address != instance.address:
            self._dropped.append(endpoint)
            endpoint = None
        if endpoint:
            endpoint.instance, endpoint.left_at = instance, None
        else:
            endpoint = Endpoint(instance, self._connect(instance))
        known[instance.id] = endpoint

    def release(self, app: str, version: str) -> Release:
        """Raises NotFound."""
        versions = self.versions(app)
        if version not in versions:
            raise NotFound(f"app {app!r} has no version {version!r}")
        return versions[version]

    def versions(self, app: str) -> Mapping[str, Release]:
        """The app's releases by version. Raises NotFound for an unknown app."""
        if app not in self._releases:
            raise NotFound(f"unknown app {app!r}")
        return self._releases[app]

    def metadata(self, app: str) -> tuple[AppMetadata, AppMetadata]:
        """The app's own metadata and the default, each empty where there is none."""
        found = [self._settings.get(key) for key in (config.app_metadata_key(app), config.DEFAULT_APP_METADATA_KEY)]
        own, default = (value if isinstance(value, AppMetadata) else _NO_METADATA for value in found)
        return own, default

    def timeout(self, app: str, version: str) -> timedelta:
        """What bounds one eval; without a version, the app's production versions' longest. Raises NotFound."""
        known = self._timeouts.get((app, version))
        if known is None:
            known = self._timeouts[app, version] = self._merged_timeout(app, version)
        return known

    def _merged_timeout(self, app: str, version: str) -> timedelta:
        versions = [version] if version else [v for v, r in self.versions(app).items() if r.phase == "production"]
        timeouts = [self._worker(app, each).timeout for each in versions or [""]]
        return max(timeout for timeout in timeouts if timeout is not None)

    def _worker(self, app: str, version: str) -> WorkerConfig:
        merged = config.DEFAULT_WORKER
        for key in reversed(config.worker_keys(app, version)):
            value = self._settings.get(key)
            if isinstance(value, WorkerConfig):
                merged = value.over(merged)
        return merged

    def pick(
        self, app: str, version: str, passed_over: Collection[Endpoint[ConnectionT]] = ()
    ) -> Endpoint[ConnectionT]:
        """The instance that is to take a request.

        Without a version, the production versions are drawn in proportion to weight x free capacity; within a version
        the instance with the smallest share of its capacity in flight is taken. ``passed_over`` are not considered.

        Raises NotFound, Unavailable (nothing ready, or all that is ready was passed over) or ResourceExhausted (all
        that is ready is full).
        """
        if version:
            self.release(app, version)
            weights = {version: 1.0}
        else:
            weights = {
                name: 1.0 if release.weight is None else release.weight
                for name, release in self.versions(app).items()
                if release.phase == "production"
            }
            if not weights:
                raise Unavailable(f"app {app!r} has no version in production")
        ready = {name: self._ready(app, name, passed_over) for name in weights}
        draws = {name: weights[name] * sum(each.free for each in found) for name, found in ready.items()}
        if not any(draws.values()):
            if not any(weights.values()):
                raise Unavailable(f"app {app!r} has no version in production with a weight above 0")
            raise self._why_none(app, version, [each for found in ready.values() for each in found])
        drawn = self._random.choices(list(draws), list(draws.values()))[0] if len(draws) > 1 else next(iter(draws))
        candidates = [each for each in ready[drawn] if each.free]
        least = min((each.in_flight + 1) / each.instance.capacity for each in candidates)
        return self._random.choice(
            [each for each in candidates if (each.in_flight + 1) / each.instance.capacity == least]
        )

    def _ready(
        self, app: str, version: str, passed_over: Collection[Endpoint[ConnectionT]]
    ) -> list[Endpoint[ConnectionT]]:
        for pool in (self._endpoints, self._left):
            found = [each for each in pool.get((app, version), {}).values() if each not in passed_over]
            if found:
                now = self._clock()
                return [each for each in found if each.shunned_until <= now] or found
        return []

    @staticmethod
    def _why_none(app: str, version: str, ready: list[Endpoint[ConnectionT]]) -> ServingError:
        what = f"version {version!r} of app {app!r}" if version else f"app {app!r}"
        if any(each.free == 0 for each in ready):
            return ResourceExhausted(f"every instance of {what} is full", retry_after_s=1.0)
        return Unavailable(f"no instance of {what} is ready")

    def failed(self, endpoint: Endpoint[ConnectionT]) -> None:
        """The endpoint's transport failed: others are preferred for a while, and if it had left, it is gone."""
        endpoint.shunned_until = self._clock() + SHUN_S
        self.refused(endpoint)

    def refused(self, endpoint: Endpoint[ConnectionT]) -> None:
        """The endpoint refused a request: if it had left the registry, it really is gone."""
        place = (endpoint.instance.app, endpoint.instance.version)
        left = self._left.get(place, {})
        if left.get(endpoint.instance.id) is endpoint:
            self._dropped.append(left.pop(endpoint.instance.id))

    def expired(self) -> list[Endpoint[ConnectionT]]:
        """The endpoints that are no longer used, each handed out once, when nothing is in flight on it."""
        oldest = self._clock() - LINGER_S
        for pool in self._left.values():
            for id_ in [id_ for id_, each in pool.items() if each.left_at is not None and each.left_at < oldest]:
                self._dropped.append(pool.pop(id_))
        idle = [each for each in self._dropped if each.in_flight == 0]
        self._dropped = [each for each in self._dropped if each.in_flight]
        return idle
