"""The registry's gRPC services: translate the request, call the logic, translate the result."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress

from atserving.config import Instance, MalformedConfig, Release
from atserving.errors import ServingError, Unavailable
from atserving.rpc import Context
from atserving.v1 import registry_pb2
from registry import messages
from registry.etcd import EtcdError, EtcdUnavailable
from registry.instances import Instances
from registry.mirror import Mirror
from registry.releases import ACCEPT_S, Releases
from registry.view import concerns

_READ_YOUR_WRITES_S = 1.0


def translate(error: Exception) -> ServingError | None:
    """Return what an error of etcd means to a caller."""
    if isinstance(error, EtcdUnavailable):
        return Unavailable(f"etcd is unreachable: {error}")
    if isinstance(error, EtcdError):
        return Unavailable(f"etcd refuses the registry: {error}")
    return None


def _require_synced(mirror: Mirror) -> None:
    if not mirror.view.synced.is_set():
        raise Unavailable(f"this registry has no config yet; etcd is unreachable: {mirror.reason}")


class RegistryServicer:
    """The API of gates and evaluators."""

    def __init__(self, mirror: Mirror, instances: Instances) -> None:
        self._mirror = mirror
        self._instances = instances

    async def watch(self, request: registry_pb2.WatchRequest, _: Context) -> AsyncIterator[registry_pb2.WatchResponse]:
        app = messages.name_from(request.app, "app") if request.app else ""
        _require_synced(self._mirror)
        with self._mirror.view.subscribe(app) as subscription:
            while delta := await subscription.next():
                for response in messages.watch_responses(delta):
                    yield response
        raise Unavailable("the registry is stopping")

    async def register_instance(
        self, request: registry_pb2.RegisterInstanceRequest, _: Context
    ) -> registry_pb2.RegisterInstanceResponse:
        ttl_s = await self._instances.register(messages.instance_from(request.instance))
        return registry_pb2.RegisterInstanceResponse(ttl_ms=ttl_s * 1000)

    async def deregister_instance(
        self, request: registry_pb2.DeregisterInstanceRequest, _: Context
    ) -> registry_pb2.DeregisterInstanceResponse:
        names = (messages.name_from(getattr(request.instance, f), f"instance.{f}") for f in ("app", "version", "id"))
        await self._instances.deregister(*names)
        return registry_pb2.DeregisterInstanceResponse()


class ReleaseServicer:
    """The API of operators and their tools."""

    def __init__(self, mirror: Mirror, releases: Releases) -> None:
        self._mirror = mirror
        self._releases = releases

    async def publish_release(
        self, request: registry_pb2.PublishReleaseRequest, _: Context
    ) -> registry_pb2.PublishReleaseResponse:
        stored = await self._releases.publish(*messages.release_from(request.release))
        await self._until_mirrored(stored.revision)
        return registry_pb2.PublishReleaseResponse(release=messages.release_to(stored.release))

    async def set_phase(self, request: registry_pb2.SetPhaseRequest, _: Context) -> registry_pb2.SetPhaseResponse:
        app = messages.name_from(request.app, "app")
        version = messages.name_from(request.version, "version")
        stored = await self._releases.set_phase(app, version, messages.phase_from(request.phase, "phase"))
        await self._until_mirrored(stored.revision)
        return registry_pb2.SetPhaseResponse(release=messages.release_to(stored.release))

    async def list_releases(
        self, request: registry_pb2.ListReleasesRequest, _: Context
    ) -> registry_pb2.ListReleasesResponse:
        app = messages.name_from(request.app, "app") if request.app else ""
        _require_synced(self._mirror)
        return self._list(app)

    async def accept_deletions(
        self, request: registry_pb2.AcceptDeletionsRequest, _: Context
    ) -> registry_pb2.AcceptDeletionsResponse:
        revision = await self._releases.accept_deletions()
        await self._until_mirrored(revision)
        return registry_pb2.AcceptDeletionsResponse(ttl_ms=ACCEPT_S * 1000)

    async def _until_mirrored(self, revision: int) -> None:
        # A caller that lists releases after a write should see it. The write is done even if the mirror is late.
        with suppress(TimeoutError):
            async with asyncio.timeout(_READ_YOUR_WRITES_S):
                await self._mirror.view.reached(revision)

    def _list(self, app: str) -> registry_pb2.ListReleasesResponse:
        view = self._mirror.view
        values = [entry.value for key, entry in view.entries.items() if concerns(key, app)]
        instances = sorted((value for value in values if isinstance(value, Instance)), key=lambda one: one.id)
        releases = sorted(
            (value for value in values if isinstance(value, Release)), key=lambda one: (one.name, one.version)
        )
        by_release: dict[tuple[str, str], list[Instance]] = {}
        for instance in instances:
            by_release.setdefault((instance.app, instance.version), []).append(instance)
        return registry_pb2.ListReleasesResponse(
            releases=[
                messages.release_status(release, by_release.get((release.name, release.version), []))
                for release in releases
            ],
            malformed=_reasons(view.malformed, app),
            warnings=_reasons(view.warnings, app),
            held=sorted(key for key in view.holdback.held if _known_to_concern(key, app)),
        )


def _reasons(by_key: Mapping[str, str], app: str) -> list[registry_pb2.MalformedKey]:
    return [
        registry_pb2.MalformedKey(key=key, reason=reason)
        for key, reason in sorted(by_key.items())
        if _known_to_concern(key, app)
    ]


def _known_to_concern(key: str, app: str) -> bool:
    try:
        return concerns(key, app)
    except MalformedConfig:
        return False
