"""Keeps an instance registered: sends heartbeats to any of the registries until it deregisters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

import grpc.aio
import msgspec
import structlog

from atserving import transport
from atserving.config import Instance
from atserving.peers import Peers
from atserving.tls import Tls
from atserving.v1 import registry_pb2, registry_pb2_grpc

log = structlog.get_logger()

_CALL_S = 2.0
_RETRY_S = (0.25, 3.0)


class Registration:
    """The registration of one instance."""

    def __init__(self, registries: Sequence[str], instance: Callable[[], Instance], tls: Tls | None = None) -> None:
        """``instance`` returns the current entry; its capacity may change."""
        self.registered = asyncio.Event()
        """Set once a registry has accepted the instance; never cleared."""
        self._registries = Peers(registries)
        self._tls = tls
        self._failed: set[str] = set()
        self._instance = instance
        self._renew = asyncio.Event()
        self._reported = ""
        self._deregistered = False
        # The channel to the registry that answered last: a connection costs more than a heartbeat. It is made anew when
        # the certificates have changed.
        self._channels: dict[tuple[str, object], grpc.aio.Channel] = {}
        # A heartbeat after the deregistration would keep the instance registered until its lease expires.
        self._calling = asyncio.Lock()

    def renew(self) -> None:
        """Send a heartbeat now, for example after the capacity has changed."""
        self._renew.set()

    async def run(self) -> None:
        """Send a heartbeat every third of the lease until ``deregister``; after a failure, try the next registry."""
        retry_s, longest_retry_s = _RETRY_S
        while True:
            self._renew.clear()
            async with self._calling:
                if self._deregistered:
                    return
                ttl_s = await self._heartbeat()
            if ttl_s:
                retry_s, next_s = _RETRY_S[0], ttl_s / 3
            else:
                retry_s, next_s = min(retry_s * 2, longest_retry_s), retry_s
            with suppress(TimeoutError):
                async with asyncio.timeout(next_s):
                    await self._renew.wait()

    async def _heartbeat(self) -> float | None:
        """Register at the first registry that accepts. Return the lease's time to live in seconds; None if none did."""
        request = registry_pb2.RegisterInstanceRequest(instance=_proto(self._instance()))
        reason = "none is known"
        for address in await self._addresses():
            try:
                stub = registry_pb2_grpc.RegistryServiceStub(await self._channel(address))
                response = await stub.RegisterInstance(request, timeout=_CALL_S)
                self.registered.set()
                self._failed.discard(address)
                self._report(
                    log.info, "instance registered", instance=self._instance().id, address=self._instance().address
                )
                return max(response.ttl_ms, 1) / 1000
            except grpc.aio.AioRpcError as error:
                reason = f"registry {address}: {error.details() or error.code().name}"
                self._failed.add(address)
                await self._close()
        self._report(log.warning, "registration failed", reason=reason)
        return None

    async def _channel(self, address: str) -> grpc.aio.Channel:
        key = address, self._tls and self._tls.credentials
        if key not in self._channels:
            await self._close()
            # A heartbeat that gets no answer tells enough. A registry has thousands of these.
            self._channels[key] = transport.channel(address, pings=False, tls=self._tls)
        return self._channels[key]

    async def _close(self) -> None:
        while self._channels:
            _, channel = self._channels.popitem()
            await channel.close(None)

    async def _addresses(self) -> list[str]:
        """Return the registries' addresses, recently failed ones last."""
        addresses = await self._registries.resolve()
        self._failed &= set(addresses)
        return sorted(addresses, key=self._failed.__contains__)

    def _report(self, log_event: Callable[..., None], event: str, **fields: str) -> None:
        """Log an event, but not repeatedly for each heartbeat."""
        if event != self._reported:
            self._reported = event
            log_event(event, **fields)

    async def deregister(self) -> None:
        """Deregister for good at the first registry that answers. If none does, the lease expires."""
        self._deregistered = True
        self._renew.set()
        request = registry_pb2.DeregisterInstanceRequest(instance=_proto(self._instance()))
        async with self._calling:
            for address in await self._addresses():
                try:
                    stub = registry_pb2_grpc.RegistryServiceStub(await self._channel(address))
                    await stub.DeregisterInstance(request, timeout=_CALL_S)
                    log.info("instance deregistered", instance=self._instance().id)
                    return
                except grpc.aio.AioRpcError as error:
                    log.warning("deregistration failed", registry=address, reason=error.details() or error.code().name)
                    await self._close()


def _proto(instance: Instance) -> registry_pb2.Instance:
    return registry_pb2.Instance(
        app=instance.app,
        version=instance.version,
        id=instance.id,
        address=instance.address,
        capacity=instance.capacity,
        digest=instance.digest,
        since=instance.since,
        files=instance.files,
        plan=registry_pb2.InstancePlan(**msgspec.structs.asdict(instance.plan)) if instance.plan else None,
    )
