"""Publish releases at a registry that may still be starting."""

from __future__ import annotations

import asyncio
import hashlib
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
