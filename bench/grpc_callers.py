"""Callers over gRPC, for :mod:`bench.callers`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc
import grpc.aio

if TYPE_CHECKING:
    from bench.callers import Job


async def call(address: str, job: Job, answered: Callable[[float, int, bytes], bool]) -> None:
    """Call a method again and again; the status of an answer is 200, or gRPC's number of a failure."""
    # Callers share a connection, as threads of one service would.
    async with grpc.aio.insecure_channel(address) as channel:
        method = channel.unary_unary(job.method, None, None)
        goes_on = True
        while goes_on:
            sent_s = time.perf_counter()
            try:
                goes_on = answered(sent_s, 200, await method(job.body))
            except grpc.aio.AioRpcError as error:
                goes_on = answered(sent_s, error.code().value[0], b"")
