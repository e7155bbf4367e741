"""What a view promises its subscribers, whatever the store does and however slow they are."""

from __future__ import annotations

import asyncio

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atserving.config import PREFIX, MalformedConfig, parse
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
    """What etcd would hold, and what a reader of its whole history would make of it."""

    def __init__(self) -> None:
        self.revision = 1
        self.held: dict[str, Put] = {}
        self.last_good: dict[str, str] = {}

    def apply(self, writes: list[tuple[str, bytes | None]]) -> list[Change]:
        self.revision += 1
        changes: list[Change] = []
        for key, value in writes:
            if value is None:
                if self.held.pop(key, None):
                    self.last_good.pop(key, None)
                    changes.append(Delete(key))
                continue
            created = self.held[key].created if key in self.held else self.revision
            self.held[key] = Put(key, value, created)
            if value in GOOD[key]:
                self.last_good[key] = value.decode()
            changes.append(self.held[key])
        return changes


class Follower:
    """A subscriber that applies what it is given."""

    def __init__(self, subscription: Subscription, app: str) -> None:
        self.subscription = subscription
        self.app = app
        self.state: dict[str, str] = {}
        self.resets = 0

    def take(self) -> bool:
        """Takes one step, if there is one now."""
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


@given(st.lists(TRANSACTION | OUTAGE | READ, max_size=30))
@settings(max_examples=150, deadline=None)
async def test_every_subscriber_ends_with_the_state_of_the_store(steps: list[tuple[str, object]]) -> None:
    store, view = Store(), View(queue_deltas=3)
    view.replace([], store.revision)
    followers = [Follower(view.subscribe(app), app) for app in ("", "a", "none")]
    for follower in followers:
        follower.subscription.__enter__()
    for kind, what in steps:
        if kind == "write":
            view.apply(store.apply(what), store.revision)  # type: ignore[arg-type]
        elif kind == "read":
            followers[what].take()  # type: ignore[call-overload]
        else:
            forgotten = _outage(store, what)  # type: ignore[arg-type]
            view.replace([*forgotten, *store.held.values()], store.revision)
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
    assert {key for key, put in store.held.items() if put.value not in GOOD[key]} == view.malformed.keys()


def _outage(store: Store, transactions: list[tuple[str, list[tuple[str, bytes | None]]]]) -> list[Put]:
    """Writes that nobody follows; returns the last good values, as the store's history has them."""
    for _, writes in transactions:
        store.apply(writes)
    return [
        Put(key, store.last_good[key].encode(), put.created)
        for key, put in store.held.items()
        if key in store.last_good
    ]


def release(version: int) -> bytes:
    return orjson.dumps({"file": f"file:///{version}"})


def synced_view(queue_deltas: int = 2) -> View:
    view = View(queue_deltas)
    view.replace([Put(KEYS[0], release(0), 1)], 1)
    return view


async def test_a_step_is_seen_whole() -> None:
    view = synced_view()
    with view.subscribe() as subscription:
        assert (await subscription.next()) == Delta({KEYS[0]: release(0).decode()}, frozenset(), 1, reset=True)
        view.apply([Delete(KEYS[0]), Put(KEYS[1], release(1), 2)], 2)
        assert (await subscription.next()) == Delta({KEYS[1]: release(1).decode()}, frozenset({KEYS[0]}), 2)


async def test_a_slow_subscriber_gets_everything_anew_and_holds_up_nobody() -> None:
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


async def test_closing_ends_who_waits() -> None:
    view = synced_view()
    with view.subscribe() as subscription:
        await subscription.next()
        waiting = asyncio.ensure_future(subscription.next())
        await asyncio.sleep(0)
        view.close()
        assert await waiting is None


async def test_a_subscriber_that_left_is_forgotten() -> None:
    view = synced_view()
    with view.subscribe():
        pass
    assert not view.subscriptions


def test_a_key_deleted_and_created_anew_while_unseen_has_no_last_good_value() -> None:
    view = synced_view()
    view.replace([Put(KEYS[0], b"{", 7)], 8)
    assert view.entries == {}
    assert view.malformed.keys() == {KEYS[0]}


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(
                    ["name", "version", "file", "phase", "timeout", "weight", "custom_values", "app", "owner"]
                ),
                x,
            )
        ),
    )
)
@settings(max_examples=200, deadline=None)
def test_no_value_breaks_the_reader(value: object) -> None:
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
