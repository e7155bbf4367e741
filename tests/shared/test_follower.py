"""A config follower ends when it is cancelled, whatever its registry does at that moment, and misses no change."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc.aio
import pytest

from atserving.config import PREFIX, Release, validate
from atserving.follower import ConfigFollower
from atserving.v1 import registry_pb2, registry_pb2_grpc
from tests.processes import running_registry
from tests.waiting import until


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


@pytest.mark.slow
async def test_a_follower_tells_contents_apart_that_python_takes_for_equal(tmp_path: Path) -> None:
    with running_registry(tmp_path) as registry:
        follower = ConfigFollower([registry.address])
        running = asyncio.create_task(follower.run())

        def digest() -> str:
            release = follower.entries.get(f"{PREFIX}eval/a/1")
            return release.digest if isinstance(release, Release) else ""

        try:
            for value in (True, 1, 1.0):
                fields = {"file": "file:///x", "custom_values": {"a": value}}
                registry.put("eval/a/1", fields)
                wanted = validate(Release, {"name": "a", "version": "1", **fields}).digest
                await until(lambda wanted=wanted: digest() == wanted)  # type: ignore[misc]
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
