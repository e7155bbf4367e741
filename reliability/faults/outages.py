"""Outages of etcd, of the registries, and of the way to them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace

import aiohttp
import grpc.aio

from atserving import transport
from atserving.admin.v1 import admin_pb2, admin_pb2_grpc
from atserving.config import PREFIX
from atserving.local.publishing import publish
from registry.etcd import Connection, EtcdClient, EtcdError
from reliability import releases
from reliability.callers import EVERY_KIND
from reliability.mesh import ETCD_BYTES
from reliability.parts import Part
from reliability.relay import Relay
from reliability.releases import PICTURES
from reliability.scenario import Scenario, Stage

_V1 = releases.digits("v1", 0)
_ALONE = replace(_V1, app="alone")
_OCTETS = {"content-type": "application/octet-stream"}
_PAUSE_S = 0.1
# So many answers in a row are from every gate: Envoy asks them in turn.
_IN_A_ROW, _KNOWN_S = 8, 10.0
_SETTINGS = "worker/app/quick/default"
_WRITES = 40
_FILLER_BYTES = 1 << 20


def _all_frozen(kind: str) -> Callable[[Stage], Awaitable[None]]:
    async def act(stage: Stage) -> None:
        parts = stage.mesh.of_kind(kind)
        for part in parts:
            part.freeze()
        try:
            await _note_a_publication(stage)
            await stage.sleep(10)
        finally:
            for part in parts:
                part.thaw()

    return act


def _all_killed(kind: str) -> Callable[[Stage], Awaitable[None]]:
    async def act(stage: Stage) -> None:
        for part in stage.mesh.of_kind(kind):
            stage.broken.add(part.name)
            part.kill()

    return act


async def _quorum_lost(stage: Stage) -> None:
    leader = await stage.mesh.leader()
    other = next(part for part in stage.mesh.of_kind("etcd") if part is not leader)
    async with _down(stage, [leader, other]):
        await _note_a_publication(stage)
        await stage.sleep(10)


async def _emptied(stage: Stage) -> None:
    await stage.mesh.etcdctl("del", "--prefix", PREFIX)
    await stage.sleep(6)
    async with transport.channel(stage.mesh.registries[0]) as channel:
        listed = await admin_pb2_grpc.AdminServiceStub(channel).ListProblems(admin_pb2.ListProblemsRequest(app="-"))
        held = [each for each in listed.problems if each.kind == admin_pb2.ListProblemsResponse.KIND_DELETION_HELD]
        stage.note(f"{len(held)} deletions held back")
        await stage.mesh.publish()
        # What is not published again is not wanted any more.
        await admin_pb2_grpc.AdminServiceStub(channel).AcceptDeletions(admin_pb2.AcceptDeletionsRequest(), timeout=5)


async def _restored(stage: Stage) -> None:
    """Replace etcd by an earlier state of it, whose revisions begin anew where the snapshot ended."""
    mesh = stage.mesh
    saved = mesh.directory / "snapshot.db"
    saved.unlink(missing_ok=True)
    await mesh.etcdctl("snapshot", "save", str(saved), member=0)
    # What came after the snapshot is lost.
    for number in range(_WRITES):
        await mesh.put(_SETTINGS, f'{{"max_concurrent": {100 + number}}}')
    async with _down(stage, mesh.of_kind("etcd")):
        for part in mesh.of_kind("etcd"):
            await mesh.restore_etcd(part.name, saved)


async def _compacted(stage: Stage) -> None:
    """Write and compact while a registry is frozen: it can't read what it has missed."""
    registry = stage.mesh.parts["registry-0"]
    registry.freeze()
    try:
        async with EtcdClient(Connection(stage.mesh.etcds)) as client:
            for number in range(_WRITES):
                revision = await client.put(PREFIX + _SETTINGS, f'{{"max_concurrent": {100 + number}}}')
            await client.delete(PREFIX + _SETTINGS)
        await stage.mesh.etcdctl("compact", str(revision))
        await stage.sleep(6)
    finally:
        registry.thaw()


async def _out_of_space(stage: Stage) -> None:
    """Fill etcd until it refuses writes, and free it by the book."""
    mesh = stage.mesh
    filler = "other/filler"
    async with EtcdClient(Connection(mesh.etcds)) as client:
        with suppress(EtcdError):
            for _ in range(2 * ETCD_BYTES // _FILLER_BYTES):
                await client.put(filler, "x" * _FILLER_BYTES)
        try:
            await _note_a_publication(stage)
            await stage.sleep(4)
        finally:
            revision = await client.delete(filler)
    await mesh.etcdctl("compact", str(revision))
    await mesh.etcdctl("defrag")
    await mesh.etcdctl("alarm", "disarm")


async def _cut_off(stage: Stage) -> None:
    """Cut the only instance of an app off from all registries, longer than its lease. Its gates still reach it."""
    mesh = stage.mesh
    async with AsyncExitStack() as stack:
        ways = [await stack.enter_async_context(Relay(address)) for address in mesh.registries]
        try:
            await publish(mesh.registries[0], _ALONE.release())
            mesh.start_evaluator(_ALONE, "cut-off", registries=[each.address for each in ways])
            await mesh.until_listed(_ALONE, 1)
            await _until_known(stage, _ALONE.app)
            asking = asyncio.create_task(_ask(stage, _ALONE.app))
            for way in ways:
                way.cut()
            # Its lease ends, however short the stage is.
            await mesh.until_listed(_ALONE, 0)
            await stage.sleep(6)
            for way in ways:
                way.mend()
            await mesh.until_listed(_ALONE, 1)
            asking.cancel()
            failed, sent = await asking
            stage.note(f"its own requests: {sent - failed} of {sent} answered")
        finally:
            await mesh.end("cut-off")
            await mesh.delete(f"eval/{_ALONE.app}/{_ALONE.version}")


async def _until_known(stage: Stage, app: str) -> None:
    """Wait until every gate knows an app. Raises TimeoutError."""
    in_a_row = 0
    async with asyncio.timeout(_KNOWN_S), aiohttp.ClientSession() as session:
        while in_a_row < _IN_A_ROW:
            async with session.post(f"{stage.mesh.edges[0]}/v1/eval/{app}", data=PICTURES[1], headers=_OCTETS) as each:
                in_a_row = in_a_row + 1 if each.status == 200 else 0
            await asyncio.sleep(_PAUSE_S)


async def _ask(stage: Stage, app: str) -> tuple[int, int]:
    """Ask an app at both edges until cancelled; return how many requests failed, and how many there were."""
    failed = sent = 0
    urls = itertools.cycle(f"{edge}/v1/eval/{app}" for edge in stage.mesh.edges)
    with suppress(asyncio.CancelledError):
        async with aiohttp.ClientSession() as session:
            for url in urls:
                async with session.post(url, data=PICTURES[1], headers=_OCTETS) as response:
                    sent += 1
                    failed += response.status != 200
                await asyncio.sleep(_PAUSE_S)
    return failed, sent


async def _note_a_publication(stage: Stage) -> None:
    """Publish while etcd takes no writes, and note what the caller is told."""
    async with transport.channel(stage.mesh.registries[0]) as channel:
        request = admin_pb2.CreateReleaseRequest(release=replace(_V1, app="late").release())
        try:
            await admin_pb2_grpc.AdminServiceStub(channel).CreateRelease(request, timeout=5)
            stage.note("a publication meanwhile was taken")
        except grpc.aio.AioRpcError as error:
            stage.note(f"a publication meanwhile: {error.code().name} {(error.details() or '').partition(':')[0]}")


@asynccontextmanager
async def _down(stage: Stage, parts: Sequence[Part]) -> AsyncIterator[None]:
    """Kill processes, and start them again in the end."""
    stage.broken |= {part.name for part in parts}
    await asyncio.gather(*(part.end() for part in parts))
    try:
        yield
    finally:
        for part in parts:
            part.start()


def outages() -> list[Scenario]:
    """Return the scenarios."""
    return [
        Scenario(name, act, EVERY_KIND, seconds, agrees=True)
        for name, act, seconds in (
            ("every registry killed", _all_killed("registry"), 8.0),
            ("every registry frozen", _all_frozen("registry"), 14.0),
            ("every etcd member killed", _all_killed("etcd"), 8.0),
            ("every etcd member frozen", _all_frozen("etcd"), 14.0),
            ("two of three etcd members killed", _quorum_lost, 14.0),
            ("etcd emptied", _emptied, 12.0),
            ("etcd restored from a snapshot", _restored, 10.0),
            ("etcd compacted while a registry is frozen", _compacted, 12.0),
            ("etcd out of space", _out_of_space, 12.0),
            ("evaluator cut off from the registries", _cut_off, 20.0),
        )
    ]
