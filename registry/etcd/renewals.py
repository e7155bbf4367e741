"""Renews many leases over one stream: a call of its own for each would cost ten times as much."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import grpc.aio

from atserving import lifecycle
from atserving.v1 import etcd_pb2
from registry.etcd.connection import TRY_TIMEOUT_S, Connection, Method
from registry.etcd.errors import EtcdError, EtcdTimeout, EtcdUnavailable, LeaseNotFound

_GATHER_S = 0.05

KEEP_ALIVE = Method("/etcdserverpb.Lease/LeaseKeepAlive", etcd_pb2.LeaseKeepAliveResponse, stream=True)


class Renewals:
    """Renews leases over a stream that is opened when it is needed, and again after a failure."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: dict[int, asyncio.Future[int]] = {}
        self._unsent: asyncio.Queue[int] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def renew(self, lease: int) -> int:
        """Renew a lease and return its time to live in seconds. Raises LeaseNotFound, EtcdUnavailable, EtcdRefused."""
        renewed = self._waiting.get(lease)
        if renewed is None:
            renewed = self._waiting[lease] = asyncio.get_running_loop().create_future()
            self._unsent.put_nowait(lease)
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._run())
        try:
            async with asyncio.timeout(TRY_TIMEOUT_S):
                ttl_s = await asyncio.shield(renewed)
        except TimeoutError:
            self._fail(EtcdTimeout("etcd does not renew leases in time"))
            if self._task:
                self._task.cancel()
            raise EtcdTimeout("etcd does not renew leases in time") from None
        if ttl_s <= 0:
            raise LeaseNotFound("the lease has expired")
        return ttl_s

    async def close(self) -> None:
        """End the stream."""
        if self._task:
            await lifecycle.end([self._task])

    async def _run(self) -> None:
        error: EtcdError = EtcdUnavailable("the stream of renewals has ended")
        try:
            async with self._connection.stream(KEEP_ALIVE) as call:
                writing = asyncio.create_task(self._write(call))
                try:
                    while isinstance(response := await call.read(), etcd_pb2.LeaseKeepAliveResponse):
                        renewed = self._waiting.pop(response.ID, None)
                        if renewed and not renewed.done():
                            renewed.set_result(response.TTL)
                finally:
                    await lifecycle.end([writing])
        except EtcdError as failure:
            error = failure
        finally:
            self._fail(error)

    async def _write(
        self, call: grpc.aio.StreamStreamCall[etcd_pb2.LeaseKeepAliveRequest, etcd_pb2.LeaseKeepAliveResponse]
    ) -> None:
        # The reader hears of a failure.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                lease = await self._unsent.get()
                # Those that come meanwhile go with it: fewer wake-ups of the threads of grpcio.
                await asyncio.sleep(_GATHER_S)
                await call.write(etcd_pb2.LeaseKeepAliveRequest(ID=lease))
                while not self._unsent.empty():
                    await call.write(etcd_pb2.LeaseKeepAliveRequest(ID=self._unsent.get_nowait()))

    def _fail(self, error: EtcdError) -> None:
        waiting, self._waiting = self._waiting, {}
        self._unsent = asyncio.Queue()
        for each in waiting.values():
            if not each.done():
                each.set_exception(error)
                # Its waiter may have left.
                each.exception()
