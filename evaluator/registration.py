"""Keeps an instance registered: heartbeats over any of the registries, until it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import grpc.aio
import structlog

from atserving import transport
from atserving.config import Instance
from atserving.v1 import registry_pb2, registry_pb2_grpc

log = structlog.get_logger()

_CALL_S = 2.0
_RETRY_S = 0.5


class Registration:
    """One instance's entry in the registries."""

    def __init__(self, registries: Sequence[str], instance: Callable[[], Instance]) -> None:
        """``instance`` says what to register now; its capacity may change."""
        self._registries = list(registries)
        self._instance = instance
        self._renew = asyncio.Event()

    def renew(self) -> None:
        """Registers again soon, as when the capacity has changed."""
        self._renew.set()

    async def run(self) -> None:
        """Registers and repeats that every third of the lease, until cancelled. A registry that fails gives way."""
        registered = False
        while True:
            self._renew.clear()
            ttl_s = await self._heartbeat()
            if ttl_s and not registered:
                log.info("registered", instance=self._instance().key, address=self._instance().address)
            elif registered and not ttl_s:
                log.warning("no registry takes the heartbeat, going on to serve")
            registered = bool(ttl_s)
            try:
                async with asyncio.timeout(ttl_s / 3 if ttl_s else _RETRY_S):
                    await self._renew.wait()
            except TimeoutError:
                continue

    async def _heartbeat(self) -> float | None:
        """The lease's time to live in seconds, from the first registry that takes the instance."""
        request = registry_pb2.RegisterInstanceRequest(instance=_proto(self._instance()))
        for address in list(self._registries):
            try:
                async with transport.channel(address) as channel:
                    stub = registry_pb2_grpc.RegistryServiceStub(channel)
                    response = await stub.RegisterInstance(request, timeout=_CALL_S)
                return max(response.ttl_ms, 1) / 1000
            except grpc.aio.AioRpcError as error:
                log.warning("not registered", registry=address, reason=error.details() or error.code().name)
                self._registries.append(self._registries.pop(0))
        return None

    async def deregister(self) -> None:
        """Leaves, at the first registry that answers. Where none does, the lease runs out."""
        request = registry_pb2.DeregisterInstanceRequest(instance=_proto(self._instance()))
        for address in list(self._registries):
            try:
                async with transport.channel(address) as channel:
                    await registry_pb2_grpc.RegistryServiceStub(channel).DeregisterInstance(request, timeout=_CALL_S)
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
