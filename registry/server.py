"""The registry's gRPC services: translate the request, call the logic, translate the result."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import grpc.aio

from atserving.config import Instance, MalformedConfig, Release
from atserving.errors import ServingError, Unavailable
from atserving.grpc_status import grpc_status
from atserving.v1 import registry_pb2, registry_pb2_grpc
from registry import messages
from registry.etcd import EtcdError, EtcdUnavailable
from registry.instances import Instances
from registry.mirror import Mirror
from registry.releases import ACCEPT_S, Releases
from registry.view import concerns

_READ_YOUR_WRITES_S = 1.0


@asynccontextmanager
async def _translated(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    try:
        yield
    except ServingError as error:
        await context.abort(grpc_status(error), error.message)
    except EtcdUnavailable as error:
        await context.abort(grpc.StatusCode.UNAVAILABLE, f"etcd is unreachable: {error}")
    except EtcdError as error:
        await context.abort(grpc.StatusCode.UNAVAILABLE, f"etcd refuses the registry: {error}")


def _require_synced(mirror: Mirror) -> None:
    if not mirror.view.synced.is_set():
        raise Unavailable(f"this registry has no config yet; etcd is unreachable: {mirror.reason}")


class RegistryServicer(registry_pb2_grpc.RegistryServiceServicer):
    """The API of gates and evaluators."""

    def __init__(self, mirror: Mirror, instances: Instances) -> None:
        self._mirror = mirror
        self._instances = instances

    async def Watch(  # noqa: N802
        self, request: registry_pb2.WatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[registry_pb2.WatchResponse]:
        async with _translated(context):
            app = messages.name_from(request.app, "app") if request.app else ""
            _require_synced(self._mirror)
            with self._mirror.view.subscribe(app) as subscription:
                while delta := await subscription.next():
                    for response in messages.watch_responses(delta):
                        yield response
            raise Unavailable("the registry is stopping")

    async def RegisterInstance(  # noqa: N802
        self, request: registry_pb2.RegisterInstanceRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> registry_pb2.RegisterInstanceResponse:
        async with _translated(context):
            ttl_s = await self._instances.register(messages.instance_from(request.instance))
        return registry_pb2.RegisterInstanceResponse(ttl_ms=ttl_s * 1000)

    async def DeregisterInstance(  # noqa: N802
        self, request: registry_pb2.DeregisterInstanceRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> registry_pb2.DeregisterInstanceResponse:
        async with _translated(context):
            names = (
                messages.name_from(getattr(request.instance, f), f"instance.{f}") for f in ("app", "version", "id")
            )
            await self._instances.deregister(*names)
        return registry_pb2.DeregisterInstanceResponse()


class ReleaseServicer(registry_pb2_grpc.ReleaseServiceServicer):
    """The API of operators and their tools."""

    def __init__(self, mirror: Mirror, releases: Releases) -> None:
        self._mirror = mirror
        self._releases = releases

    async def PublishRelease(  # noqa: N802
        self, request: registry_pb2.PublishReleaseRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> registry_pb2.PublishReleaseResponse:
        async with _translated(context):
            stored = await self._releases.publish(*messages.release_from(request.release))
            await self._until_mirrored(stored.revision)
        return registry_pb2.PublishReleaseResponse(release=messages.release_to(stored.release))

    async def SetPhase(  # noqa: N802
        self, request: registry_pb2.SetPhaseRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> registry_pb2.SetPhaseResponse:
        async with _translated(context):
            app = messages.name_from(request.app, "app")
            version = messages.name_from(request.version, "version")
            stored = await self._releases.set_phase(app, version, messages.phase_from(request.phase, "phase"))
            await self._until_mirrored(stored.revision)
        return registry_pb2.SetPhaseResponse(release=messages.release_to(stored.release))

    async def ListReleases(  # noqa: N802
        self, request: registry_pb2.ListReleasesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> registry_pb2.ListReleasesResponse:
        async with _translated(context):
            app = messages.name_from(request.app, "app") if request.app else ""
            _require_synced(self._mirror)
        return self._list(app)

    async def AcceptDeletions(  # noqa: N802
        self, request: registry_pb2.AcceptDeletionsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> registry_pb2.AcceptDeletionsResponse:
        async with _translated(context):
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
