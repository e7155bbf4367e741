"""Asks instances for their load."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import grpc
import grpc.aio

from atserving import transport
from atserving.admin.v1 import admin_pb2
from atserving.tls import EVALUATOR, Tls
from atserving.v1 import evaluator_pb2, evaluator_pb2_grpc

# A page is answered within a second, however many instances are gone.
_ASK_S = 1.0


async def ask(statuses: Iterable[admin_pb2.InstanceStatus], tls: Tls | None = None) -> None:
    """Fill in the load of instances, or why there is none."""
    await asyncio.gather(*(_ask(each, tls) for each in statuses))


async def _ask(status: admin_pb2.InstanceStatus, tls: Tls | None) -> None:
    async with transport.channel(status.address, tls=tls, role=EVALUATOR) as channel:
        stub = evaluator_pb2_grpc.EvaluatorServiceStub(channel)
        try:
            load = await stub.GetLoad(evaluator_pb2.GetLoadRequest(id=status.id), timeout=_ASK_S)
        except grpc.aio.AioRpcError as error:
            silent = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            status.unreachable = "does not answer" if silent else error.details() or error.code().name
            return
    for name in ("in_flight", "fetching", "away", "software"):
        setattr(status.load, name, getattr(load, name))
