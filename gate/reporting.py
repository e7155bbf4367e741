"""Tells the registries what a gate has found of shadowed versions, for operators to read."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import suppress

import grpc.aio

from atserving import transport
from atserving.peers import Peers
from atserving.tls import Tls
from atserving.v1 import registry_pb2, registry_pb2_grpc
from gate.shadow import Shadows

_EVERY_S = 1.0
# A registry that has restarted knows nothing.
_AGAIN_S = 15.0
_CALL_S = 2.0


async def report(registries: Sequence[str], shadows: Shadows, tls: Tls | None = None) -> None:
    """Report to every registry, soon after something was found and now and then, until cancelled."""
    peers = Peers(registries)
    gate = secrets.token_urlsafe(9)
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(_AGAIN_S):
                await shadows.changed.wait()
        # What comes meanwhile goes with it.
        await asyncio.sleep(_EVERY_S)
        shadows.changed.clear()
        if found := [each.to_proto() for each in shadows.found()]:
            request = registry_pb2.ReportComparisonsRequest(gate=gate, comparisons=found)
            await asyncio.gather(*(_tell(address, request, tls) for address in await peers.resolve()))


async def _tell(address: str, request: registry_pb2.ReportComparisonsRequest, tls: Tls | None) -> None:
    # It is told again.
    with suppress(grpc.aio.AioRpcError):
        async with transport.channel(address, tls=tls) as channel:
            await registry_pb2_grpc.RegistryServiceStub(channel).ReportComparisons(request, timeout=_CALL_S)
