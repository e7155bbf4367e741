"""A config that is larger than a message reaches a follower whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Set
from pathlib import Path

import orjson
import pytest

from atserving.config import ConfigValue, Release, release_key
from atserving.follower import ConfigFollower
from atserving.transport import MAX_MESSAGE_BYTES
from registry.etcd import EtcdClient
from tests.processes import Etcd, Process, Registry
from tests.waiting import until

pytestmark = pytest.mark.slow

SIZE = 1 << 20
COUNT = MAX_MESSAGE_BYTES // SIZE + 4
VALUE = orjson.dumps({"file": "file:///x", "custom_values": {"text": "x" * (SIZE - 100)}})


async def test_a_config_larger_than_a_message_arrives_as_one_step(
    etcd: Etcd, client: EtcdClient, tmp_path: Path, processes: Callable[[Process], Process]
) -> None:
    for number in range(COUNT):
        await client.put(release_key("app", str(number)), VALUE)
    registry = Registry(tmp_path, [etcd.address])
    processes(registry)
    registry.wait_serving()
    steps: list[int] = []

    def changed(upserts: Mapping[str, ConfigValue], _: Set[str]) -> None:
        steps.append(len(upserts))

    follower = ConfigFollower([registry.address], changed)
    following = asyncio.create_task(follower.run())
    try:
        await until(lambda: steps, what=f"the config arrives; {follower.last_error}")
        assert steps == [COUNT]
        await client.delete(release_key("app", "0"))
        await client.put(release_key("more", "1"), VALUE)
        await until(lambda: len(steps) == 3)
        releases = {value.name: value.version for value in follower.entries.values() if isinstance(value, Release)}
        assert releases.keys() == {"app", "more"}
        assert len(follower.entries) == COUNT
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
