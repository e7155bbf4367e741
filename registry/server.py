"""The API of gates and evaluators: translate the request, call the logic, translate the result."""

from __future__ import annotations

from collections.abc import AsyncIterator

from atserving.errors import ServingError, Unavailable
from atserving.rpc import Context
from atserving.v1 import registry_pb2
from registry import messages
from registry.comparisons import Comparisons
from registry.etcd import EtcdError, EtcdUnavailable
from registry.instances import Instances
from registry.mirror import Mirror


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

    def __init__(self, mirror: Mirror, instances: Instances, comparisons: Comparisons) -> None:
        self._mirror = mirror
        self._comparisons = comparisons
        self._instances = instances

    async def watch(self, request: registry_pb2.WatchRequest, _: Context) -> AsyncIterator[registry_pb2.WatchResponse]:
        app = messages.name_from(request.app, "app") if request.app else ""
        _require_synced(self._mirror)
        with self._mirror.view.subscribe(app) as subscription:
            while (delta := await subscription.next()) is not None:
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

    async def report_comparisons(
        self, request: registry_pb2.ReportComparisonsRequest, _: Context
    ) -> registry_pb2.ReportComparisonsResponse:
        self._comparisons.take(request)
        return registry_pb2.ReportComparisonsResponse()
