"""Keeps an instance registered: heartbeats over any of the registries, until it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

import grpc.aio
import structlog

from atserving import transport
from atserving.addresses import Addresses
from atserving.config import Instance
from atserving.v1 import registry_pb2, registry_pb2_grpc

log = structlog.get_logger()

_CALL_S = 2.0
_RETRY_S = (0.25, 3.0)


class Registration:
    """One instance's entry in the registries."""

    def __init__(self, registries: Sequence[str], instance: Callable[[], Instance]) -> None:
        """``instance`` says what to register now; its capacity may change."""
        self.registered = asyncio.Event()
        """Set once a registry has taken the instance; never cleared."""
        self._registries = Addresses(registries)
        self._failed: set[str] = set()
        self._instance = instance
        self._renew = asyncio.Event()
        self._reported = ""
        self._leaving = False
        # A heartbeat that overtook the leaving would keep the instance registered until its lease runs out.
        self._calling = asyncio.Lock()

    def renew(self) -> None:
        """Registers again soon, as when the capacity has changed."""
        self._renew.set()

    async def run(self) -> None:
        """Registers, and again every third of the lease, until ``deregister``. A registry that fails gives way."""
        retry_s, longest_retry_s = _RETRY_S
        while True:
            self._renew.clear()
            async with self._calling:
                if self._leaving:
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
        """The lease's time to live in seconds, from the first registry that takes the instance."""
        request = registry_pb2.RegisterInstanceRequest(instance=_proto(self._instance()))
        reason = "none is known"
        for address in await self._addresses():
            try:
                async with transport.channel(address) as channel:
                    stub = registry_pb2_grpc.RegistryServiceStub(channel)
                    response = await stub.RegisterInstance(request, timeout=_CALL_S)
                self.registered.set()
                self._failed.discard(address)
                self._report("registered", instance=self._instance().key, address=self._instance().address)
                return max(response.ttl_ms, 1) / 1000
            except grpc.aio.AioRpcError as error:
                reason = f"registry {address}: {error.details() or error.code().name}"
                self._failed.add(address)
        self._report("not registered, going on to serve and to try", reason=reason)
        return None

    async def _addresses(self) -> list[str]:
        """Of all registries, those last that failed last."""
        addresses = await self._registries.resolve()
        self._failed &= set(addresses)
        return sorted(addresses, key=self._failed.__contains__)

    def _report(self, event: str, **fields: str) -> None:
        """Logs the first of several that say the same, as heartbeats do."""
        if event != self._reported:
            self._reported = event
            log.info(event, **fields)

    async def deregister(self) -> None:
        """Leaves for good, at the first registry that answers. Where none does, the lease runs out."""
        self._leaving = True
        self._renew.set()
        request = registry_pb2.DeregisterInstanceRequest(instance=_proto(self._instance()))
        async with self._calling:
            for address in await self._addresses():
                try:
                    async with transport.channel(address) as channel:
                        stub = registry_pb2_grpc.RegistryServiceStub(channel)
                        await stub.DeregisterInstance(request, timeout=_CALL_S)
                    log.info("deregistered", instance=self._instance().key)
                    return
                except grpc.aio.AioRpcError as error:
                    log.warning("not deregistered", registry=address, reason=error.details() or error.code().name)


def _proto(instance: Instance) -> registry_pb2.Instance:
    return registry_pb2.Instance(
        app=instance.app,
        version=instance.version,
        id=instance.id,
        address=instance.address,
        capacity=instance.capacity,
    )
