"""What the mirror promises, against real etcd that is killed, frozen, wiped, compacted and restored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
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
    """Counts the snapshots."""

    snapshots = 0

    async def snapshot(self, prefix: str, page_keys: int = 3) -> Snapshot:
        self.snapshots += 1
        return await super().snapshot(prefix, page_keys)


class Followed:
    """A mirror that runs until paused, and what its subscriber was given."""

    def __init__(self, etcd: list[Etcd]) -> None:
        self.client = Client(Connection([member.address for member in etcd]))
        self.view = View()
        self.mirror = Mirror(self.client, self.view)
        self.deltas: list[Delta] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Followed:
        self.resume()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.pause()
        self.view.close()
        await self.client.__aexit__()

    def resume(self) -> None:
        self._tasks.append(asyncio.create_task(self.mirror.run()))

    async def pause(self) -> None:
        """Follows nothing for a while, as where the network is down."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self.mirror.reason = "paused"

    async def follows(self) -> None:
        await until(lambda: not self.mirror.reason)

    async def collect(self) -> None:
        with self.view.subscribe() as subscription:
            while delta := await subscription.next():
                self.deltas.append(delta)

    @property
    def state(self) -> dict[str, str]:
        return {key: entry.value_json for key, entry in self.view.entries.items()}


@asynccontextmanager
async def following(*etcd: Etcd) -> AsyncIterator[Followed]:
    async with Followed(list(etcd)) as followed, asyncio.TaskGroup() as tasks:
        await followed.view.synced.wait()
        await followed.follows()
        collecting = tasks.create_task(followed.collect())
        await until(lambda: followed.deltas)
        followed.deltas.clear()
        yield followed
        collecting.cancel()


async def test_a_snapshot_of_many_pages_is_of_one_revision(etcd: Etcd, client: EtcdClient) -> None:
    keys = [release_key("a", str(number)) for number in range(10, 20)]
    for number, key in enumerate(keys):
        await client.put(key, release(number))

    class Interrupting(EtcdClient):
        """Deletes the last key and writes the first between two pages."""

        async def snapshot(self, prefix: str, page_keys: int = 3) -> Snapshot:
            read = self._connection.read

            async def reading(*arguments: Any) -> Any:
                page = await read(*arguments)
                await client.txn([], [put(keys[0], release(99)), delete(keys[-1])])
                return page

            self._connection.read = reading  # type: ignore[method-assign]
            return await super().snapshot(prefix, page_keys)

    async with Interrupting(Connection([etcd.address])) as interrupting:
        snapshot = await interrupting.snapshot(PREFIX)
    assert {kv.key.decode(): kv.value.decode() for kv in snapshot.kvs} == {k: release(n) for n, k in enumerate(keys)}


async def test_the_mirror_pages_through_all_keys(etcd: Etcd, client: EtcdClient) -> None:
    keys = [release_key("a", str(number)) for number in range(10)]
    for key in keys:
        await client.put(key, release(1))
    async with following(etcd) as followed:
        assert followed.state == dict.fromkeys(keys, release(1))


async def test_a_transaction_is_one_delta(etcd: Etcd, client: EtcdClient) -> None:
    await client.put(A1, release(1))
    async with following(etcd) as followed:
        done = await client.txn([], [put(A2, release(2)), put(B1, release(3)), delete(A1)])
        await followed.view.reached(done.header.revision)
        await until(lambda: followed.deltas)
        assert followed.deltas == [Delta({A2: release(2), B1: release(3)}, frozenset({A1}), done.header.revision)]


async def test_what_happened_while_disconnected_arrives_in_its_steps(etcd: Etcd, client: EtcdClient) -> None:
    await client.put(B1, release(1))
    async with following(etcd) as followed:
        await client.put(A1, release(1))
        last = await client.delete(A1)
        await followed.view.reached(last)
        await followed.pause()
        last = (await client.txn([], [put(A1, release(2)), put(A2, release(2))])).header.revision
        followed.resume()
        await followed.view.reached(last)
        assert followed.state == {A1: release(2), A2: release(2), B1: release(1)}
        assert followed.client.snapshots == 1


async def back(etcd: Etcd, client: EtcdClient) -> None:
    """etcd serves again, and the client, which tries a write but once, has noticed."""
    await etcd.ready()
    await until_async(lambda: answered(client), EtcdUnavailable)


async def answered(client: EtcdClient) -> bool:
    await client.get("/any")
    return True


async def test_resumes_after_etcd_was_killed(etcd: Etcd, client: EtcdClient) -> None:
    await client.put(A1, release(1))
    async with following(etcd) as followed:
        for number in range(2, 4):
            etcd.kill()
            await until(lambda: followed.mirror.reason)
            assert followed.state[A1] == release(number - 1)
            etcd.start()
            await back(etcd, client)
            last = await client.put(A1, release(number))
            await followed.view.reached(last)
        assert followed.state == {A1: release(3)}
        assert followed.client.snapshots == 1


async def test_compaction_while_disconnected_becomes_the_delta_that_leads_there(etcd: Etcd, client: EtcdClient) -> None:
    await client.put(A1, release(1))
    await client.put(A2, release(1))
    async with following(etcd) as followed:
        await followed.pause()
        await client.put(A2, release(2))
        await client.delete(A1)
        last = await client.put(B1, release(1))
        etcd.ctl("compact", str(last))
        followed.resume()
        await until(lambda: followed.deltas)
        assert followed.deltas == [Delta({A2: release(2), B1: release(1)}, frozenset({A1}), last)]
        await client.put(B1, release(2))
        await until(lambda: followed.state[B1] == release(2))


@pytest.mark.parametrize("refilled_beyond", [False, True])
@pytest.mark.parametrize("same_cluster_id", [False, True])
async def test_a_wiped_store_is_read_anew(
    etcd: Etcd, client: EtcdClient, refilled_beyond: bool, same_cluster_id: bool
) -> None:
    await client.put(A1, release(1))
    await client.put(B1, release(1))
    async with following(etcd) as followed:
        await followed.pause()
        etcd.kill()
        etcd.wipe()
        if not same_cluster_id:
            etcd.command += ["--initial-cluster-token", "another"]
        etcd.start()
        await back(etcd, client)
        for _ in range(10 if refilled_beyond else 1):
            last = await client.put(A2, release(2))
        followed.resume()
        await until(lambda: followed.deltas)
        assert followed.deltas == [Delta({A2: release(2)}, frozenset({A1, B1}), last)]


async def test_a_store_wiped_under_the_mirror_is_read_anew(etcd: Etcd, client: EtcdClient) -> None:
    await client.put(A1, release(1))
    await client.put(A1, release(1))
    async with following(etcd) as followed:
        etcd.kill()
        etcd.wipe()
        etcd.start()
        await until(lambda: not followed.state)
        await back(etcd, client)
        last = await client.put(B1, release(1))
        await until(lambda: followed.state == {B1: release(1)})
        assert followed.view.revision == last


async def test_a_store_restored_from_a_backup_is_read_anew(etcd: Etcd, client: EtcdClient, tmp_path: Path) -> None:
    await client.put(A1, release(1))
    backup = tmp_path / "backup"
    etcd.ctl("snapshot", "save", str(backup))
    async with following(etcd) as followed:
        for number in range(5):
            last = await client.put(A2, release(number))
        await followed.view.reached(last)
        etcd.kill()
        etcd.restore(backup)
        etcd.start()
        await until(lambda: followed.state == {A1: release(1)})
        await back(etcd, client)
        await client.put(B1, release(7))
        await until(lambda: followed.state == {A1: release(1), B1: release(7)})


async def test_progress_alone_moves_nothing(etcd: Etcd, client: EtcdClient) -> None:
    await client.put(A1, release(1))
    async with following(etcd) as followed:
        before = followed.mirror._position
        await client.put("/elsewhere", "x")
        await followed.pause()
        followed.resume()
        await followed.follows()
        assert followed.mirror._position == before
        assert followed.client.snapshots == 1


async def test_a_malformed_value_is_listed_and_the_last_good_one_stays(etcd: Etcd, client: EtcdClient) -> None:
    await client.put(A1, release(1))
    await client.put(B1, BAD)
    async with following(etcd) as followed:
        assert followed.state == {A1: release(1)}
        await followed.view.reached(await client.put(A1, BAD))
        assert followed.state == {A1: release(1)}
        assert followed.view.malformed == {
            A1: "file: Input should be a valid string",
            B1: "file: Input should be a valid string",
        }
        await followed.view.reached(await client.put(A1, release(2)))
        assert followed.state == {A1: release(2)}
        assert followed.view.malformed.keys() == {B1}
        await client.put(A1, BAD)
        await followed.view.reached(await client.delete(A1))
        assert followed.state == {}
        assert followed.view.malformed.keys() == {B1}


async def test_keys_and_values_that_are_no_text_are_listed(etcd: Etcd, client: EtcdClient) -> None:
    await client.put(A1, b"\xff\xfe")
    await client.put(f"{PREFIX}unknown", "{}")
    await client.put(f"{PREFIX}\udcff".encode(errors="surrogateescape"), "{}")
    async with following(etcd) as followed:
        assert followed.state == {}
        assert followed.view.malformed.keys() == {A1, f"{PREFIX}unknown", f"{PREFIX}\\xff"}


async def test_a_mirror_that_starts_later_has_the_same_last_good_values(etcd: Etcd, client: EtcdClient) -> None:
    await client.put(A1, release(1))
    async with following(etcd) as early:
        for value in (release(2), BAD, "{"):
            await early.view.reached(await client.put(A1, value))
        async with following(etcd) as late:
            assert late.state == early.state == {A1: release(2)}
            assert late.view.malformed == early.view.malformed


async def test_what_history_no_longer_has_is_only_listed(etcd: Etcd, client: EtcdClient) -> None:
    await client.put(A1, release(1))
    etcd.ctl("compact", str(await client.put(A1, BAD)))
    async with following(etcd) as followed:
        assert followed.state == {}
        assert followed.view.malformed.keys() == {A1}


@pytest.mark.parametrize("how", ["freeze", "kill"])
async def test_one_member_lost_is_no_matter(members: list[Etcd], how: str) -> None:
    async with (
        EtcdClient(Connection([member.address for member in members[1:]])) as client,
        following(*members) as followed,
    ):
        await until_async(lambda: client.put(A1, release(1)), EtcdUnavailable)
        await until(lambda: followed.state)
        getattr(members[0], how)()
        # The first may have been the leader; the rest then elect one.
        await until_async(lambda: client.put(A1, release(2)), EtcdUnavailable)
        await until(lambda: followed.state[A1] == release(2))
        assert followed.client.snapshots == 1


async def test_a_lost_quorum_is_noticed_and_survived(members: list[Etcd]) -> None:
    one, two, three = members
    async with EtcdClient(Connection([one.address])) as client, following(one) as followed:
        await until_async(lambda: client.put(A1, release(1)), EtcdUnavailable)
        await until(lambda: followed.state)
        two.kill()
        three.kill()
        await until(lambda: followed.mirror.reason)
        assert followed.state == {A1: release(1)}
        two.start()
        await followed.follows()
        await until_async(lambda: client.put(A1, release(2)), EtcdUnavailable)
        await until(lambda: followed.state == {A1: release(2)})


async def test_etcd_may_come_later(tmp_path: Path, processes: Callable[[Process], Process]) -> None:
    (member,) = cluster(tmp_path, ["late"])
    async with Followed([member]) as followed:
        await until(lambda: "Connection refused" in followed.mirror.reason)
        assert not followed.view.synced.is_set()
        processes(member)
        await followed.follows()
        assert followed.view.synced.is_set()
