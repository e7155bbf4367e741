"""The mirror against real etcd: killed, frozen, wiped, compacted, restored from a backup."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from atserving.config import PREFIX, release_key
from registry.etcd import Connection, EtcdClient, EtcdUnavailable, Snapshot, delete, put
from registry.mirror import Mirror
from registry.view import Delta, View
from tests.processes import Etcd, Process, cluster
from tests.waiting import until, until_async

A1, A2, B1 = release_key("a", "1"), release_key("a", "2"), release_key("b", "1")
BAD = '{"file": 3}'


def release(number: int) -> str:
    return orjson.dumps({"file": f"file:///{number}.tar"}).decode()


class Client(EtcdClient):
    """A client that reads snapshots in small pages."""

    async def snapshot(self, prefix: str, page_keys: int = 3, *, without: str = "") -> Snapshot:
        return await super().snapshot(prefix, page_keys, without=without)


class RecordingView(View):
    """A view that records the keys that it has whenever it is said to be current."""

    def __init__(self) -> None:
        super().__init__()
        self.current: list[set[str]] = []

    def set_stale(self, stale: bool) -> None:
        super().set_stale(stale)
        if not stale:
            self.current.append(set(self.entries))


class RunningMirror:
    """A mirror that runs until it is paused, and the deltas of one subscriber."""

    def __init__(self, etcd: list[Etcd]) -> None:
        self.client = Client(Connection([member.address for member in etcd]))
        self.view = RecordingView()
        self.mirror = Mirror(self.client, self.view)
        self.deltas: list[Delta] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> RunningMirror:
        self.resume()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.pause()
        self.view.close()
        await self.client.__aexit__()

    def resume(self) -> None:
        self._tasks.append(asyncio.create_task(self.mirror.run()))

    async def pause(self) -> None:
        """Stop mirroring, as in a network outage, until resume()."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self.mirror.reason = "paused"

    async def until_watching(self) -> None:
        await until(lambda: not self.mirror.reason)

    async def collect(self) -> None:
        with self.view.subscribe() as subscription:
            while delta := await subscription.next():
                self.deltas.append(delta)

    @property
    def state(self) -> dict[str, str]:
        return {key: entry.value_json for key, entry in self.view.entries.items()}


@pytest.fixture(scope="module")
def own_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    """An etcd without registries, which would write the history."""
    (member,) = cluster(tmp_path_factory.mktemp("etcd"), ["mirrored"])
    member.start()
    asyncio.run(member.ready())
    yield member
    member.kill()


@pytest.fixture
async def empty_etcd(own_etcd: Etcd) -> Etcd:
    """That etcd, without keys of earlier tests; for tests that do not break it."""
    await asyncio.to_thread(own_etcd.ctl, "del", "--prefix", PREFIX)
    return own_etcd


@pytest.fixture
async def writer(empty_etcd: Etcd) -> AsyncIterator[EtcdClient]:
    async with EtcdClient(Connection([empty_etcd.address])) as client:
        yield client


@asynccontextmanager
async def running_mirror(*etcd: Etcd) -> AsyncIterator[RunningMirror]:
    async with RunningMirror(list(etcd)) as running, asyncio.TaskGroup() as tasks:
        await running.view.synced.wait()
        await running.until_watching()
        collecting = tasks.create_task(running.collect())
        await until(lambda: running.deltas)
        running.deltas.clear()
        yield running
        collecting.cancel()


async def test_a_snapshot_of_many_pages_is_of_one_revision(empty_etcd: Etcd, writer: EtcdClient) -> None:
    keys = [release_key("a", str(number)) for number in range(10, 20)]
    for number, key in enumerate(keys):
        await writer.put(key, release(number))

    class Interrupted(Connection):
        """Deletes the last key and writes the first after every page."""

        async def read(self, *arguments: Any) -> Any:
            page = await super().read(*arguments)
            await writer.txn([], [put(keys[0], release(99)), delete(keys[-1])])
            return page

    async with EtcdClient(Interrupted([empty_etcd.address])) as client:
        snapshot = await client.snapshot(PREFIX, page_keys=3)
    assert {kv.key.decode(): kv.value.decode() for kv in snapshot.kvs} == {k: release(n) for n, k in enumerate(keys)}


async def test_the_mirror_pages_through_all_keys(empty_etcd: Etcd, writer: EtcdClient) -> None:
    keys = [release_key("a", str(number)) for number in range(10)]
    for key in keys:
        await writer.put(key, release(1))
    async with running_mirror(empty_etcd) as running:
        assert running.state == dict.fromkeys(keys, release(1))


async def test_a_transaction_is_one_delta(empty_etcd: Etcd, writer: EtcdClient) -> None:
    await writer.put(A1, release(1))
    async with running_mirror(empty_etcd) as running:
        done = await writer.txn([], [put(A2, release(2)), put(B1, release(3)), delete(A1)])
        await running.view.reached(done.header.revision)
        await until(lambda: running.deltas)
        assert running.deltas == [Delta({A2: release(2), B1: release(3)}, frozenset({A1}), done.header.revision)]


async def test_changes_during_a_disconnection_arrive_as_one_step(empty_etcd: Etcd, writer: EtcdClient) -> None:
    await writer.put(B1, release(1))
    async with running_mirror(empty_etcd) as running:
        await running.view.reached(await writer.put(A1, release(1)))
        await running.pause()
        await writer.txn([], [put(A1, release(2)), put(A2, release(2))])
        last = await writer.delete(B1)
        running.resume()
        await running.view.reached(last)
        await until(lambda: len(running.deltas) > 1)
        assert running.deltas[1:] == [Delta({A1: release(2), A2: release(2)}, frozenset({B1}), last)]


async def test_the_view_is_stale_until_it_has_what_it_missed(empty_etcd: Etcd, writer: EtcdClient) -> None:
    await writer.put(B1, release(1))
    async with running_mirror(empty_etcd) as running:
        await running.pause()
        running.view.current.clear()
        last = await writer.put(A1, release(1))
        running.resume()
        await running.view.reached(last)
        await running.until_watching()
        assert running.view.current == [{A1, B1}]


async def until_back(etcd: Etcd, client: EtcdClient) -> None:
    """Wait until etcd serves and the client has reconnected: the client tries a write only once."""
    await etcd.ready()
    await until_async(lambda: is_connected(client), EtcdUnavailable)


async def is_connected(client: EtcdClient) -> bool:
    await client.get("/any")
    return True


async def test_the_mirror_goes_on_after_a_crash_of_etcd(etcd: Etcd, client: EtcdClient) -> None:
    await client.put(A1, release(1))
    async with running_mirror(etcd) as running:
        for number in range(2, 4):
            etcd.kill()
            await until(lambda: running.mirror.reason)
            assert running.state[A1] == release(number - 1)
            etcd.start()
            await until_back(etcd, client)
            last = await client.put(A1, release(number))
            await running.view.reached(last)
        assert running.state == {A1: release(3)}


async def test_a_compaction_during_a_disconnection_gives_one_delta_with_the_difference(
    empty_etcd: Etcd, writer: EtcdClient
) -> None:
    await writer.put(A1, release(1))
    await writer.put(A2, release(1))
    async with running_mirror(empty_etcd) as running:
        await running.pause()
        await writer.put(A2, release(2))
        await writer.delete(A1)
        last = await writer.put(B1, release(1))
        empty_etcd.ctl("compact", str(last))
        running.resume()
        await until(lambda: running.deltas)
        assert running.deltas == [Delta({A2: release(2), B1: release(1)}, frozenset({A1}), last)]
        await writer.put(B1, release(2))
        await until(lambda: running.state[B1] == release(2))


@pytest.mark.parametrize("refilled_beyond", [False, True])
@pytest.mark.parametrize("same_cluster_id", [False, True])
async def test_a_wiped_store_gives_a_new_snapshot(
    etcd: Etcd, client: EtcdClient, refilled_beyond: bool, same_cluster_id: bool
) -> None:
    await client.put(A1, release(1))
    await client.put(B1, release(1))
    async with running_mirror(etcd) as running:
        await running.pause()
        etcd.kill()
        etcd.wipe()
        if not same_cluster_id:
            etcd.command += ["--initial-cluster-token", "another"]
        etcd.start()
        await until_back(etcd, client)
        for _ in range(10 if refilled_beyond else 1):
            last = await client.put(A2, release(2))
        running.resume()
        await until(lambda: running.deltas)
        assert running.deltas == [Delta({A2: release(2)}, frozenset({A1, B1}), last)]


async def test_a_store_wiped_during_the_watch_gives_a_new_snapshot(etcd: Etcd, client: EtcdClient) -> None:
    await client.put(A1, release(1))
    await client.put(A1, release(1))
    async with running_mirror(etcd) as running:
        etcd.kill()
        etcd.wipe()
        etcd.start()
        await until(lambda: not running.state)
        await until_back(etcd, client)
        last = await client.put(B1, release(1))
        await until(lambda: running.state == {B1: release(1)})
        assert running.view.revision == last


async def test_a_store_restored_from_a_backup_gives_a_new_snapshot(
    etcd: Etcd, client: EtcdClient, tmp_path: Path
) -> None:
    await client.put(A1, release(1))
    backup = tmp_path / "backup"
    etcd.ctl("snapshot", "save", str(backup))
    async with running_mirror(etcd) as running:
        for number in range(5):
            last = await client.put(A2, release(number))
        await running.view.reached(last)
        etcd.kill()
        etcd.restore(backup)
        etcd.start()
        await until(lambda: running.state == {A1: release(1)})
        await until_back(etcd, client)
        await client.put(B1, release(7))
        await until(lambda: running.state == {A1: release(1), B1: release(7)})


async def test_a_malformed_value_is_listed_and_the_last_good_value_stays(empty_etcd: Etcd, writer: EtcdClient) -> None:
    await writer.put(A1, release(1))
    await writer.put(B1, BAD)
    async with running_mirror(empty_etcd) as running:
        assert running.state == {A1: release(1)}
        await running.view.reached(await writer.put(A1, BAD))
        assert running.state == {A1: release(1)}
        assert running.view.malformed == {
            A1: "file: Expected str, got int",
            B1: "file: Expected str, got int",
        }
        await running.view.reached(await writer.put(A1, release(2)))
        assert running.state == {A1: release(2)}
        assert running.view.malformed.keys() == {B1}
        await writer.put(A1, BAD)
        await running.view.reached(await writer.delete(A1))
        assert running.state == {}
        assert running.view.malformed.keys() == {B1}


async def test_keys_and_values_that_are_not_utf8_are_listed_as_malformed(empty_etcd: Etcd, writer: EtcdClient) -> None:
    await writer.put(A1, b"\xff\xfe")
    await writer.put(f"{PREFIX}unknown", "{}")
    await writer.put(f"{PREFIX}\udcff".encode(errors="surrogateescape"), "{}")
    async with running_mirror(empty_etcd) as running:
        assert running.state == {}
        assert running.view.malformed.keys() == {A1, f"{PREFIX}unknown", f"{PREFIX}\\xff"}


async def test_a_mirror_that_starts_later_has_the_same_last_good_values(empty_etcd: Etcd, writer: EtcdClient) -> None:
    await writer.put(A1, release(1))
    async with running_mirror(empty_etcd) as early:
        for value in (release(2), BAD, "{"):
            await early.view.reached(await writer.put(A1, value))
        async with running_mirror(empty_etcd) as late:
            assert late.state == early.state == {A1: release(2)}
            assert late.view.malformed == early.view.malformed


async def test_a_mirror_that_missed_the_last_good_value_finds_it(empty_etcd: Etcd, writer: EtcdClient) -> None:
    await writer.put(A1, release(1))
    async with running_mirror(empty_etcd) as running:
        await running.pause()
        await writer.put(A1, release(2))
        last = await writer.put(A1, BAD)
        running.resume()
        await running.view.reached(last)
        assert running.state == {A1: release(2)}


async def test_a_malformed_value_without_history_has_no_last_good_value(empty_etcd: Etcd, writer: EtcdClient) -> None:
    await writer.put(A1, release(1))
    empty_etcd.ctl("compact", str(await writer.put(A1, BAD)))
    async with running_mirror(empty_etcd) as running:
        assert running.state == {}
        assert running.view.malformed.keys() == {A1}


@pytest.mark.parametrize("how", ["freeze", "kill"])
async def test_the_mirror_survives_the_loss_of_one_member(members: list[Etcd], how: str) -> None:
    async with (
        EtcdClient(Connection([member.address for member in members[1:]])) as client,
        running_mirror(*members) as running,
    ):
        await until_async(lambda: client.put(A1, release(1)), EtcdUnavailable)
        await until(lambda: running.state)
        getattr(members[0], how)()
        # If the first member was the leader, the others elect a new one.
        await until_async(lambda: client.put(A1, release(2)), EtcdUnavailable)
        await until(lambda: running.state[A1] == release(2))


async def test_the_mirror_detects_and_survives_a_lost_quorum(members: list[Etcd]) -> None:
    one, two, three = members
    async with EtcdClient(Connection([one.address])) as client, running_mirror(one) as running:
        await until_async(lambda: client.put(A1, release(1)), EtcdUnavailable)
        await until(lambda: running.state)
        two.kill()
        three.kill()
        await until(lambda: running.mirror.reason)
        assert running.state == {A1: release(1)}
        two.start()
        await running.until_watching()
        await until_async(lambda: client.put(A1, release(2)), EtcdUnavailable)
        await until(lambda: running.state == {A1: release(2)})


async def test_a_mirror_waits_for_an_etcd_that_starts_later(
    tmp_path: Path, processes: Callable[[Process], Process]
) -> None:
    (member,) = cluster(tmp_path, ["late"])
    async with RunningMirror([member]) as running:
        await until(lambda: "Connection refused" in running.mirror.reason)
        assert not running.view.synced.is_set()
        processes(member)
        await running.until_watching()
        assert running.view.synced.is_set()
