"""The view: every subscriber ends with the state of the store, however slow it is."""

from __future__ import annotations

import asyncio

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atserving.config import CLOSED, PREFIX, AppMetadata, MalformedConfig, parse
from registry.view import Change, Delete, Delta, Put, Subscription, View

KEYS = [
    f"{PREFIX}eval/a/1",
    f"{PREFIX}eval/b/1",
    f"{PREFIX}worker/app/a/default",
    f"{PREFIX}worker/default",
    f"{PREFIX}nonsense",
]
GOOD = {
    KEYS[0]: [b'{"file":"file:///1"}', b'{"file":"file:///2"}'],
    KEYS[1]: [b'{"file":"file:///1"}', b'{"file":"file:///1","weight":0}'],
    KEYS[2]: [b'{"timeout":"1s"}', b"{}"],
    KEYS[3]: [b'{"timeout":"2s"}', b'{"unknown":1}'],
    KEYS[4]: [],
}
BAD = [b"", b"{", b"[]", b'{"file":3,"timeout":"never"}', b"\xff"]


class Store:
    """A model of etcd, with the last good value of each key."""

    def __init__(self) -> None:
        self.revision = 1
        self.stored: dict[str, Put] = {}
        self.last_good: dict[str, str] = {}

    def apply(self, writes: list[tuple[str, bytes | None]]) -> list[Change]:
        self.revision += 1
        changes: list[Change] = []
        for key, value in writes:
            if value is None:
                if self.stored.pop(key, None):
                    self.last_good.pop(key, None)
                    changes.append(Delete(key))
                continue
            created = self.stored[key].created if key in self.stored else self.revision
            self.stored[key] = Put(key, value, created)
            if value in GOOD[key]:
                self.last_good[key] = value.decode()
            changes.append(self.stored[key])
        return changes


class Follower:
    """A subscriber that applies its steps."""

    def __init__(self, subscription: Subscription, app: str) -> None:
        self.subscription = subscription
        self.app = app
        self.state: dict[str, str] = {}
        self.resets = 0

    def take(self) -> bool:
        """Take one step; return False if none is waiting."""
        step = self.subscription.next()
        try:
            step.send(None)
        except StopIteration as ready:
            delta: Delta = ready.value
        else:
            step.close()
            return False
        if delta.reset:
            self.resets += 1
            self.state = {}
        self.state |= delta.upserts
        for key in delta.deletes:
            del self.state[key]
        return True


KEY = st.sampled_from(KEYS)
WRITE = KEY.flatmap(lambda key: st.tuples(st.just(key), st.none() | st.sampled_from([*GOOD[key], *BAD])))
TRANSACTION = st.tuples(st.just("write"), st.lists(WRITE, min_size=1, max_size=4))
OUTAGE = st.tuples(st.just("outage"), st.lists(TRANSACTION, max_size=3))
READ = st.tuples(st.just("read"), st.integers(0, 2))


@given(st.lists(TRANSACTION | OUTAGE | READ, max_size=20))
@settings(max_examples=100, deadline=None)
async def test_every_subscriber_ends_with_the_state_of_the_store(steps: list[tuple[str, object]]) -> None:
    store, view = Store(), View(queue_deltas=3)
    view.replace([], store.revision)
    followers = [Follower(view.subscribe(app), app) for app in ("", "a", "none")]
    for follower in followers:
        follower.subscription.__enter__()
    for kind, argument in steps:
        if kind == "write":
            view.apply(store.apply(argument), store.revision)  # type: ignore[arg-type]
        elif kind == "read":
            followers[argument].take()  # type: ignore[call-overload]
        else:
            earlier = _outage(store, argument)  # type: ignore[arg-type]
            view.replace([*earlier, *store.stored.values()], store.revision)
    for follower in followers:
        while follower.take():
            pass
        app, other = follower.app, {"a": "/b/", "none": "/a/", "": "///"}[follower.app]
        expected = {
            key: value
            for key, value in store.last_good.items()
            if not app or (other not in key and (app == "a" or "/b/" not in key))
        }
        assert follower.state == expected
    assert {key for key, put in store.stored.items() if put.value not in GOOD[key]} == view.malformed.keys()
    assert view.inventory.size == sum(len(each.value_json.encode()) for each in view.entries.values())
    published = {("a", "1", 0): KEYS[0], ("b", "1", 0): KEYS[1]}
    assert {*view.inventory.instances()} == {one for one, key in published.items() if key in view.entries}


def _outage(store: Store, transactions: list[tuple[str, list[tuple[str, bytes | None]]]]) -> list[Put]:
    """Write while the mirror is down; return the last good values from the store's history."""
    for _, writes in transactions:
        store.apply(writes)
    return [
        Put(key, store.last_good[key].encode(), put.created)
        for key, put in store.stored.items()
        if key in store.last_good
    ]


def release(version: int) -> bytes:
    return orjson.dumps({"file": f"file:///{version}"})


def synced_view(queue_deltas: int = 2) -> View:
    view = View(queue_deltas)
    view.replace([Put(KEYS[0], release(0), 1)], 1)
    return view


async def test_a_subscriber_receives_a_transaction_as_one_step() -> None:
    view = synced_view()
    with view.subscribe() as subscription:
        assert (await subscription.next()) == Delta({KEYS[0]: release(0).decode()}, frozenset(), 1, reset=True)
        view.apply([Delete(KEYS[0]), Put(KEYS[1], release(1), 2)], 2)
        assert (await subscription.next()) == Delta({KEYS[1]: release(1).decode()}, frozenset({KEYS[0]}), 2)


async def test_a_slow_subscriber_receives_a_new_snapshot_and_delays_nobody() -> None:
    view = synced_view(queue_deltas=2)
    with view.subscribe() as slow, view.subscribe() as quick:
        await slow.next()
        await quick.next()
        for version in range(1, 5):
            view.apply([Put(KEYS[0], release(version), 1)], version + 1)
            step = await quick.next()
            assert step
            assert not step.reset
        step = await slow.next()
        assert step == Delta({KEYS[0]: release(4).decode()}, frozenset(), 5, reset=True)
        view.apply([Put(KEYS[0], release(9), 1)], 6)
        step = await slow.next()
        assert step == Delta({KEYS[0]: release(9).decode()}, frozenset(), 6)


async def test_closing_the_view_ends_a_waiting_subscriber() -> None:
    view = synced_view()
    with view.subscribe() as subscription:
        await subscription.next()
        waiting = asyncio.ensure_future(subscription.next())
        await asyncio.sleep(0)
        view.close()
        assert await waiting is None


async def test_the_view_forgets_a_subscription_that_ended() -> None:
    view = synced_view()
    with view.subscribe():
        pass
    assert not view.subscriptions


def test_a_key_deleted_and_recreated_during_an_outage_has_no_last_good_value() -> None:
    view = synced_view()
    view.replace([Put(KEYS[0], b"{", 7)], 8)
    assert view.entries == {}
    assert view.malformed.keys() == {KEYS[0]}


FIELD = st.sampled_from(["name", "version", "file", "phase", "timeout", "weight", "custom_values", "app", "owner"])
LEAF = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8)
# Small values, since hypothesis spends nearly all the time on making them. Deep nesting has a test of its own.
JSON = st.recursive(
    LEAF, lambda x: st.lists(x, max_size=3) | st.dictionaries(FIELD, x, max_size=3), max_leaves=6
) | st.dictionaries(FIELD, LEAF, max_size=4)


@given(JSON)
@settings(max_examples=200, deadline=None)
def test_no_value_breaks_the_parser(value: object) -> None:
    data = orjson.dumps(value)
    for key in (*KEYS, f"{PREFIX}instance/a/1/x", f"{PREFIX}app/metadata/a"):
        try:
            parse(key, data)
        except MalformedConfig:
            continue


@pytest.mark.parametrize("depth", [200, 300, 1000, 100_000])
def test_deeply_nested_values_are_read_or_refused(depth: int) -> None:
    view = synced_view()
    view.apply([Put(KEYS[1], b'{"file":"file:///1","custom_values":{"a":' + b"[" * depth + b"]" * depth + b"}}", 2)], 2)
    assert (KEYS[1] in view.entries) == (KEYS[1] not in view.malformed) == (depth == 200)


ACCESS_KEYS = [f"{PREFIX}app/metadata/a", f"{PREFIX}app/default/metadata"]


@pytest.mark.parametrize("key", ACCESS_KEYS)
def test_malformed_access_rules_close_an_app_until_they_are_mended(key: str) -> None:
    view = View()
    for before in (b'{"public": "perhaps"}', b"{"):
        view.apply([Put(key, before, 1)], 1)
        assert view.entries[key].value == CLOSED
        assert "closed until you correct the value" in view.malformed[key]
        view.apply([Put(key, b'{"public": true}', 1)], 2)
        assert view.entries[key].value == AppMetadata(public=True)
        assert key not in view.malformed
    view.apply([Delete(key)], 4)
    assert key not in view.entries


def test_rules_under_an_unknown_key_are_closed_ones_of_no_apps_stream() -> None:
    view, key = View(), f"{PREFIX}app/acl/a"
    for number, closes in enumerate((True, False, True)):
        view.apply([Put(key, b'{"public": false}' if closes else b'{"limit": 3}', 1)], number)
        assert view.malformed[key].startswith("unknown key")
        assert view.snapshot().upserts == ({key: CLOSED.to_json()} if closes else {})
        assert not view.snapshot("a").upserts
    view.apply([Delete(key)], 4)
    assert not view.malformed
    assert not view.snapshot().upserts


def test_an_unknown_key_that_names_no_app_closes_none() -> None:
    view = View()
    view.apply([Put(f"{PREFIX}app/metadata/", b'{"public": false}', 1)], 1)
    assert "closes no app" in view.malformed[f"{PREFIX}app/metadata/"]
    assert not view.entries


def test_a_warning_of_unknown_fields_ends_with_the_fields() -> None:
    view = View()
    view.apply([Put(KEYS[3], b'{"timout": "2s"}', 1)], 1)
    assert view.warnings == {KEYS[3]: "unknown field 'timout', did you mean 'timeout'?"}
    view.apply([Put(KEYS[3], b'{"timeout": "2s"}', 1)], 2)
    assert not view.warnings
    view.apply([Put(KEYS[3], b'{"timout": "2s"}', 1), Delete(KEYS[3])], 3)
    assert not view.warnings
