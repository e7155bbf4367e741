"""Publish releases at a registry that may still be starting, and wait for their instances."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc.aio

from atserving import transport
from atserving.errors import StartError
from atserving.v1 import registry_pb2, registry_pb2_grpc

_RETRY_S = 0.05


def file_uri(path: Path) -> str:
    """Return the URI of a release's tar, with its digest."""
    return f"{path.as_uri()}#sha256={hashlib.sha256(path.read_bytes()).hexdigest()}"


async def publish(registry: str, *releases: registry_pb2.Release) -> None:
    """Publish releases, and try again for as long as the registry is unavailable. Raises StartError."""
    async with transport.channel(registry) as channel:
        stub = registry_pb2_grpc.ReleaseServiceStub(channel)
        for release in releases:
            request = registry_pb2.PublishReleaseRequest(release=release)
            while not await _published(stub, request):  # noqa: ASYNC110 - another process becomes available
                await asyncio.sleep(_RETRY_S)


async def _published(
    stub: registry_pb2_grpc.ReleaseServiceAsyncStub, request: registry_pb2.PublishReleaseRequest
) -> bool:
    try:
        await stub.PublishRelease(request)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return False
        release = request.release
        raise StartError(f"publishing {release.name} {release.version} failed: {error.details()}") from None
    return True


async def served(
    registry: str, releases: Sequence[registry_pb2.Release], tell: Callable[[Sequence[str]], None]
) -> None:
    """Wait until each release has an instance. ``tell`` gets the names of those without one whenever they change."""
    told: list[str] = []
    async with transport.channel(registry) as channel:
        stub = registry_pb2_grpc.ReleaseServiceStub(channel)
        while missing := await _missing(stub, releases):
            if missing != told:
                told = missing
                tell(missing)
            await asyncio.sleep(_RETRY_S)


async def _missing(
    stub: registry_pb2_grpc.ReleaseServiceAsyncStub, releases: Sequence[registry_pb2.Release]
) -> list[str]:
    try:
        listed = await stub.ListReleases(registry_pb2.ListReleasesRequest())
        ready = {(each.release.name, each.release.version) for each in listed.releases if each.instances}
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise StartError(f"the registry does not list its releases: {error.details()}") from None
        ready = set()
    return [f"{each.name} {each.version}" for each in releases if (each.name, each.version) not in ready]
