"""Publish releases at a registry that may still be starting, and wait for their instances."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc.aio

from atserving import transport
from atserving.admin.v1 import admin_pb2, admin_pb2_grpc
from atserving.errors import StartError
from atserving.tls import Tls

_RETRY_S = 0.05


def file_uri(path: Path) -> str:
    """Return the URI of a release's tar, with its digest."""
    return f"{path.as_uri()}#sha256={hashlib.sha256(path.read_bytes()).hexdigest()}"


def release_of(
    app: str,
    version: str,
    tar: Path,
    custom_values: Mapping[str, Any],
    phase: admin_pb2.Phase.ValueType = admin_pb2.PHASE_UNSPECIFIED,
    desc: str = "",
) -> admin_pb2.Release:
    """Return the release of a tar on this machine."""
    release = admin_pb2.Release(app=app, version=version, file=file_uri(tar), phase=phase, desc=desc)
    release.custom_values.update(custom_values)
    return release


async def publish(registry: str, *releases: admin_pb2.Release, tls: Tls | None = None) -> None:
    """Publish releases, and try again for as long as the registry is unavailable. Raises StartError."""
    async with transport.channel(registry, tls=tls) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        for release in releases:
            # They come before their instances, those in production too.
            request = admin_pb2.CreateReleaseRequest(release=release, force=True)
            while not await _published(stub, request):  # noqa: ASYNC110 - another process becomes available
                await asyncio.sleep(_RETRY_S)


async def _published(stub: admin_pb2_grpc.AdminServiceAsyncStub, request: admin_pb2.CreateReleaseRequest) -> bool:
    try:
        await stub.CreateRelease(request)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return False
        release = request.release
        raise StartError(f"publishing {release.app} {release.version} failed: {error.details()}") from None
    return True


async def served(
    registry: str,
    releases: Sequence[admin_pb2.Release],
    tell: Callable[[Sequence[str]], None],
    tls: Tls | None = None,
) -> None:
    """Wait until each release has an instance. ``tell`` gets the names of those without one whenever they change."""
    told: list[str] = []
    async with transport.channel(registry, tls=tls) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        while missing := await _missing(stub, releases):
            if missing != told:
                told = missing
                tell(missing)
            await asyncio.sleep(_RETRY_S)


async def _missing(stub: admin_pb2_grpc.AdminServiceAsyncStub, releases: Sequence[admin_pb2.Release]) -> list[str]:
    try:
        listed = await stub.ListReleases(admin_pb2.ListReleasesRequest(app="-", page_size=1000))
        ready = {(each.app, each.version) for each in listed.releases if each.instances}
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise StartError(f"the registry does not list its releases: {error.details()}") from None
        ready = set()
    return [f"{each.app} {each.version}" for each in releases if (each.app, each.version) not in ready]
