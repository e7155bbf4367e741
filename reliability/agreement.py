"""Whether all of a mesh have the same config: every registry what etcd has, and every gate a write of now."""

from __future__ import annotations

import asyncio
import time

import grpc.aio

from atserving import transport
from atserving.config import HISTORY, PREFIX, app_metadata_key
from atserving.v1 import registry_pb2, registry_pb2_grpc, serving_pb2, serving_pb2_grpc
from registry.etcd import Connection, EtcdClient, EtcdError
from reliability.mesh import Mesh

_POLL_S = 0.05
_ASK_S = 2.0
_PROBE, _OPEN, _CLOSED = "probe", b'{"public": true}', b'{"public": false}'


async def missing(mesh: Mesh, timeout_s: float) -> str:
    """Wait until all have the same config, and return an empty text; after ``timeout_s`` return what is missing."""
    until_s = time.monotonic() + timeout_s
    expected: grpc.StatusCode | None = None
    async with EtcdClient(Connection(mesh.etcds)) as client:
        while True:
            try:
                expected = expected or await _write(client)
                said = await _registries(mesh, client) or await _gates(mesh, expected)
            except (grpc.aio.AioRpcError, EtcdError, TimeoutError) as error:
                said = f"an answer, got {type(error).__name__}"
            if not said or time.monotonic() > until_s:
                return said
            await asyncio.sleep(_POLL_S)


async def _write(client: EtcdClient) -> grpc.StatusCode:
    """Open or close an app that is not there, and return what callers get then. The key stays. Raises EtcdError."""
    key = app_metadata_key(_PROBE)
    known = await client.get(key)
    closes = known is None or known.value == _OPEN
    await client.put(key, _CLOSED if closes else _OPEN)
    return grpc.StatusCode.UNAUTHENTICATED if closes else grpc.StatusCode.NOT_FOUND


async def _registries(mesh: Mesh, client: EtcdClient) -> str:
    for address in mesh.registries:
        entries = await _entries(address)
        snapshot = await client.snapshot(PREFIX, without=HISTORY)
        stored = {kv.key.decode(): kv.value.decode() for kv in snapshot.kvs}
        if entries != stored:
            differing = sorted(key for key, _ in entries.items() ^ stored.items())
            return f"the registry at {address} to have what etcd has, such as {differing[0]}"
    return ""


async def _entries(registry: str) -> dict[str, str]:
    """Return the config that a registry has, by key. Raises AioRpcError."""
    found: dict[str, str] = {}
    async with transport.channel(registry) as channel:
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        call = stub.Watch(registry_pb2.WatchRequest(), timeout=_ASK_S)
        async for response in call:
            found |= {each.key: each.value_json for each in response.upserts}
            if not response.more:
                break
        call.cancel()
    return found


async def _gates(mesh: Mesh, expected: grpc.StatusCode) -> str:
    request = serving_pb2.EvalRequest(app=_PROBE, data=[serving_pb2.Resource(body=b"x")])
    for address in mesh.gates:
        async with transport.channel(address) as channel:
            try:
                await serving_pb2_grpc.ServingServiceStub(channel).Eval(request, timeout=_ASK_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is not expected:
                    return f"the gate at {address} to follow a write"
    return ""
