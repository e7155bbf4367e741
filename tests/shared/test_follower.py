"""A config follower ends when it is cancelled, whatever its registry does at that moment."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest

from atserving.follower import ConfigFollower
from atserving.v1 import registry_pb2, registry_pb2_grpc


class CancellingStub:
    """A registry whose stream fails in the same step of the event loop in which the follower is cancelled."""

    follower: asyncio.Task[None]

    def __init__(self, _: grpc.aio.Channel) -> None:
        pass

    def Watch(self, _: registry_pb2.WatchRequest) -> CancellingStub:
        return self

    async def read(self) -> registry_pb2.WatchResponse:
        self.follower.cancel()
        nothing = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing, "the registry has failed", None)


async def test_a_cancelled_follower_ends_even_if_its_stream_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_pb2_grpc, "RegistryServiceStub", CancellingStub)
    follower = ConfigFollower(["127.0.0.1:1"])
    CancellingStub.follower = asyncio.create_task(follower.run())
    await asyncio.wait({CancellingStub.follower}, timeout=5)
    assert CancellingStub.follower.cancelled()
