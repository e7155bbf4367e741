"""The operators' API of one etcd, in this process."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from atserving import lifecycle
from atserving.admin.v1 import admin_pb2
from atserving.config import Instance, Release, instance_key, release_key
from registry.admin.history import History, Recorder
from registry.admin.operators import OperatorStore
from registry.admin.service import AdminService
from registry.admin.writes import Writer
from registry.comparisons import Comparisons
from registry.etcd import Connection, EtcdClient
from registry.mirror import Mirror
from registry.view import View
from tests.processes import Etcd, cluster

_numbers = itertools.count()


class NoContext:
    """The context of a call without headers."""

    caller = ""
    peer_names = ()

    @property
    def notes(self) -> dict[str, Any]:
        return {}

    def header(self, name: str) -> str | None:
        return None


CONTEXT = NoContext()


@dataclass
class Operator:
    """The API, as one operator uses it, and etcd beside it."""

    service: AdminService
    client: EtcdClient
    mirror: Mirror
    recorder: Recorder
    comparisons: Comparisons
    app: str

    async def publish(self, version: str, **fields: object) -> admin_pb2.Release:
        """Publish a version of the test's app."""
        release = admin_pb2.Release(app=self.app, version=version, **{"file": "file:///m.tar", **fields})  # type: ignore[arg-type]
        return await self.service.create_release(admin_pb2.CreateReleaseRequest(release=release), CONTEXT)

    async def register(self, version: str, id_: str = "i", capacity: int = 4) -> None:
        """Register an instance of a version, with the content that it has now."""
        release = self.mirror.view.entries[release_key(self.app, version)].value
        assert isinstance(release, Release)
        instance = Instance(
            app=self.app,
            version=version,
            id=id_,
            address="10.0.0.1:50052",
            capacity=capacity,
            digest=release.digest,
        )
        await self.seen(await self.client.put(instance.key, instance.to_json()))

    async def deregister(self, version: str, id_: str = "i") -> None:
        await self.seen(await self.client.delete(instance_key(self.app, version, id_)))

    async def etcdctl(self, key: str, value: str | None) -> None:
        """Write or delete a key as other tools do."""
        revision = await (self.client.delete(key) if value is None else self.client.put(key, value))
        await self.seen(revision)
        async with asyncio.timeout(10):
            await self.recorder.reached(revision)

    async def seen(self, revision: int) -> None:
        """Wait until the mirror has a revision."""
        async with asyncio.timeout(10):
            await self.mirror.view.reached(revision)

    async def phases(self) -> dict[str, str]:
        """Return the phases of the app's versions, as etcd has them."""
        snapshot = await self.client.snapshot(release_key(self.app, ""))
        return {
            each["version"]: each.get("phase", "staging")
            for kv in snapshot.kvs
            if (each := msgspec.json.decode(kv.value))
        }

    async def history(self) -> list[admin_pb2.Change]:
        """Return the app's history, the newest change first."""
        return list((await self.service.list_history(admin_pb2.ListHistoryRequest(app=self.app), CONTEXT)).changes)


@asynccontextmanager
async def operating(etcd: Etcd, app: str, most: int = 100, hold_s: float = 0) -> AsyncIterator[Operator]:
    """Yield an operator of an etcd, who keeps ``most`` changes, and holds back deletions for ``hold_s``."""
    async with EtcdClient(Connection([etcd.address])) as client:
        mirror = Mirror(client, View(hold_s=hold_s))
        recorder = Recorder(client, most, 3600)
        comparisons = Comparisons()
        writer = Writer(client, mirror, recorder)
        store = OperatorStore(client, writer, None)
        service = AdminService(mirror, writer, History(client), comparisons, store)
        tasks = [asyncio.create_task(each.run()) for each in (mirror, recorder)]
        try:
            async with asyncio.timeout(10):
                await mirror.view.synced.wait()
                await recorder.reached(1)
            yield Operator(service, client, mirror, recorder, comparisons, app)
        finally:
            await lifecycle.end(tasks)


@pytest.fixture(scope="package")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    """An etcd for these tests, each with an app of its own. Their deletions must not alarm other registries."""
    (member,) = cluster(tmp_path_factory.mktemp("etcd"), ["admin"])
    member.start()
    asyncio.run(member.ready())
    yield member
    member.kill()


@pytest.fixture
async def operator(shared_etcd: Etcd) -> AsyncIterator[Operator]:
    """An operator with an app of the test's own."""
    async with operating(shared_etcd, f"admin{next(_numbers)}") as one:
        yield one
