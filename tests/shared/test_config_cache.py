"""The saved config: a process that starts while no registry answers uses it, and nothing else breaks a start."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import orjson
import pytest

from atserving import config, follower
from atserving.config import AppMetadata, ConfigValue, parse
from atserving.config_cache import ConfigCache
from atserving.follower import ConfigFollower
from tests.processes import Gate, Registry, evaluator, running_registry, start_evaluator
from tests.waiting import until, until_async

NOWHERE = "127.0.0.1:1"
RELEASE = "/ava/serving/eval/a/1"
ENTRIES: dict[str, ConfigValue] = {
    key: parse(key, value)
    for key, value in {
        RELEASE: '{"file": "file:///x", "custom_values": {"n": 9007199254740993}}',
        "/ava/serving/app/metadata/a": '{"public": false, "user_whitelist": []}',
        "/ava/serving/worker/default": '{"timeout": "100ms"}',
        "/ava/serving/instance/a/1/i": f'{{"address": "h:1", "capacity": 1, "digest": "{"a" * 64}"}}',
    }.items()
}


@asynccontextmanager
async def following(path: Path, registry: str = NOWHERE, app: str = "") -> AsyncIterator[ConfigFollower]:
    one = ConfigFollower([registry], app=app, cache=path)
    running = asyncio.create_task(one.run())
    try:
        yield one
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_follower_without_a_registry_begins_with_the_saved_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    ConfigCache(path, "").save(ENTRIES)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    async with following(path) as one, asyncio.timeout(60):
        await one.synced.wait()
        assert one.entries == ENTRIES


async def test_the_age_of_a_saved_config_is_since_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    ConfigCache(path, "").save(ENTRIES)
    saved = orjson.loads(path.read_bytes())
    path.write_bytes(orjson.dumps({**saved, "saved_s": saved["saved_s"] - 1000}))
    async with following(path) as one, asyncio.timeout(60):
        await one.synced.wait()
        assert one.age_s >= 1000
        assert (one.revision, one.is_following) == (0, False)


async def tries(one: ConfigFollower) -> None:
    """Wait until a follower has tried its registry, and whatever it does then."""
    await until(lambda: one.last_error != "not yet tried")
    await asyncio.sleep(0)


@pytest.mark.parametrize("saved", [b"", b"{", b"\xff", b"[]", b'{"app": "b", "saved_s": 1, "entries": {}}', None])
async def test_a_file_without_a_usable_config_is_as_none(tmp_path: Path, saved: bytes | None) -> None:
    path = tmp_path / "config.json"
    if saved is not None:
        path.write_bytes(saved)
    assert ConfigCache(path, "").load() is None
    async with following(path) as one:
        await tries(one)
        assert not one.synced.is_set()


async def test_malformed_rules_in_the_file_close_their_app(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    rules = "/ava/serving/app/metadata/a"
    entries = {rules: "{", RELEASE: "{", "/ava/serving/eval/b/1": '{"file": "file:///x"}'}
    path.write_bytes(orjson.dumps({"app": "", "saved_s": 1, "entries": entries}))
    async with following(path) as one, asyncio.timeout(60):
        await one.synced.wait()
        assert one.entries.keys() == {rules, "/ava/serving/eval/b/1"}
        assert one.entries[rules] == config.CLOSED


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    ConfigCache(tmp_path / "missing" / "config.json", "").save(ENTRIES)
    (tmp_path / "folder").mkdir()
    ConfigCache(tmp_path / "folder", "").save(ENTRIES)
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]
    ConfigCache(tmp_path / "config.json", "").save(ENTRIES)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["config.json", "folder"]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with running_registry(tmp_path / "registry") as registry:
        yield registry


@pytest.mark.slow
async def test_a_follower_saves_every_change_and_prefers_a_registry(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "_SAVE_S", 0.01)
    path = tmp_path / "config.json"
    ConfigCache(path, "").save(ENTRIES)
    registry.publish("app")
    async with following(path, registry.address) as one:
        await until(lambda: one.entries.keys() == {"/ava/serving/eval/app/v1"})
        await until(lambda: list(orjson.loads(path.read_bytes())["entries"]) == ["/ava/serving/eval/app/v1"])
        registry.put("app/metadata/app", {"public": False})
        await until(lambda: "/ava/serving/app/metadata/app" in orjson.loads(path.read_bytes())["entries"])
        registry.kill()
    async with following(path) as late, asyncio.timeout(60):
        await late.synced.wait()
        assert late.entries == one.entries
        assert late.entries["/ava/serving/app/metadata/app"] == AppMetadata(public=False)


@pytest.mark.slow
async def test_a_gate_and_an_evaluator_start_while_no_registry_answers(registry: Registry, tmp_path: Path) -> None:
    caches = [("--config-cache", str(tmp_path / name)) for name in ("gate.json", "evaluator.json")]
    gate = Gate([registry.address], *caches[0], "--wait", "60")
    registry.publish("app", phase="production")

    async def answers() -> bool:
        return await gate.status("app") is grpc.StatusCode.OK

    try:
        gate.start()
        with evaluator(registry, "app", "v1", *caches[1]):
            await until_async(answers)
            await until(lambda: b"/ava/serving/instance/app/v1/" in (tmp_path / "gate.json").read_bytes())
            registry.kill()
            gate.kill()
            gate.start()
            # The instance is the one in the saved config.
            await until_async(answers)
            assert gate.logged("age_s", event="config cache used")["keys"] == 2
        late = start_evaluator(registry.address, "app", "v1", *caches[1])
        try:
            assert late.logged("age_s", event="config cache used")
            assert late.logged("device", event="net loaded")
            registry.start()
            late.wait_serving()
            await until_async(answers)
        finally:
            late.kill()
    finally:
        gate.kill()


async def test_a_gate_that_restarts_while_etcd_is_empty_keeps_its_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    keys = [f"/ava/serving/eval/a/{number}" for number in range(3)]
    releases = {key: parse(key, '{"file": "file:///x"}') for key in keys}
    ConfigCache(path, "").save(releases)
    with running_registry(tmp_path / "empty") as registry:
        one = ConfigFollower([registry.address], cache=path, hold_s=600)
        running = asyncio.create_task(one.run())
        try:
            async with asyncio.timeout(60):
                await one.synced.wait()
            assert one.entries == releases
            # The registry has answered.
            await until(lambda: one._steps > 0)
            assert one.entries == releases
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_a_deeply_nested_cache_is_unusable(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"x":' + b"[" * 200_000)
    assert ConfigCache(path, "").load() is None
