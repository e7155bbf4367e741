"""The router picks ready instances by version, weight and free capacity, and remembers those that left for a while."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atserving.config import (
    CLOSED,
    AppMetadata,
    AppRouting,
    ConfigValue,
    Instance,
    Release,
    WorkerConfig,
    app_routing_key,
    parse,
    validate,
)
from atserving.errors import NotFound, ResourceExhausted, ServingError, Unavailable
from gate.endpoint import Endpoint, Kind
from gate.router import EJECT_S, LINGER_S, Router
from gate.usage import IDLE_S

PORT = 1000


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(eq=False)
class Connected:
    """Stands in for the connection to an instance."""

    address: str
    is_away: bool = False
    is_up: bool = False


@dataclass
class Table:
    """A router of named instances."""

    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.router: Router[Connected] = Router(
            lambda instance: Connected(instance.address), self.clock, random.Random(7)
        )

    def put(self, *values: ConfigValue) -> None:
        self.router.apply({_key(value): value for value in values}, set())

    def delete(self, *values: ConfigValue) -> None:
        self.router.apply({}, {_key(value) for value in values})

    def pick(self, app: str, version: str) -> Endpoint[Connected]:
        return self.router.pick(self.router.route(app, version))


def _key(value: ConfigValue) -> str:
    assert isinstance(value, Release | Instance)
    return value.key


def release(version: str, phase: str = "production", app: str = "app", weight: float | None = None) -> Release:
    return validate(
        Release, {"name": app, "version": version, "file": "file:///x.tar", "phase": phase, "weight": weight}
    )


def instance(version: str, id_: str, capacity: int = 4, app: str = "app", port: int = PORT) -> Instance:
    return Instance(app=app, version=version, id=id_, address=f"{id_}:{port}", capacity=capacity)


@pytest.fixture
def table() -> Table:
    return Table()


def test_request_for_a_version_reaches_it_in_any_phase(table: Table) -> None:
    table.put(release("v1"), release("v2", "staging"), instance("v1", "a"), instance("v2", "b"))
    assert table.pick("app", "v1").instance.id == "a"
    assert table.pick("app", "v2").instance.id == "b"


def test_staging_version_receives_no_unversioned_traffic(table: Table) -> None:
    table.put(release("v1"), release("v2", "staging"), instance("v1", "a"), instance("v2", "b"))
    assert {table.pick("app", "").instance.id for _ in range(200)} == {"a"}


def test_promotion_and_rollback_move_the_unversioned_traffic(table: Table) -> None:
    table.put(release("v1"), release("v2", "staging"), instance("v1", "a"), instance("v2", "b"))
    table.put(release("v1", "staging"), release("v2"))
    assert {table.pick("app", "").instance.id for _ in range(50)} == {"b"}
    table.put(release("v1"), release("v2", "staging"))
    assert {table.pick("app", "").instance.id for _ in range(50)} == {"a"}


def test_unknown_app_or_version_is_not_found(table: Table) -> None:
    table.put(release("v1"), instance("v1", "a"))
    with pytest.raises(NotFound, match="unknown app 'nothing'"):
        table.pick("nothing", "")
    with pytest.raises(NotFound, match="app 'app' has no version 'v9'"):
        table.pick("app", "v9")


def test_app_without_a_ready_instance_is_unavailable(table: Table) -> None:
    table.put(release("v1"), release("v2", "staging"), instance("v2", "b"))
    with pytest.raises(Unavailable, match="no instance of app 'app' is ready"):
        table.pick("app", "")
    table.put(release("v1", "staging"))
    with pytest.raises(Unavailable, match="no version in production"):
        table.pick("app", "")


def test_instance_without_a_release_receives_no_traffic(table: Table) -> None:
    table.put(release("v1"), instance("v1", "a"), instance("ghost", "b"))
    with pytest.raises(NotFound):
        table.pick("app", "ghost")
    assert {table.pick("app", "").instance.id for _ in range(50)} == {"a"}


def with_file(file: str) -> Release:
    return validate(Release, {"name": "app", "version": "v1", "file": file, "phase": "production"})


def loaded(id_: str, content: Release | None) -> Instance:
    return msgspec.structs.replace(instance("v1", id_), digest=content.digest if content else "")


def test_only_instances_with_the_content_of_the_release_take_requests(table: Table) -> None:
    old, new = with_file("file:///old.tar"), with_file("file:///new.tar")
    table.put(loaded("a", old), old)
    assert table.pick("app", "v1").instance.id == "a"
    table.put(new)
    with pytest.raises(Unavailable, match="is ready; 1 have loaded other content"):
        table.pick("app", "v1")
    table.put(loaded("b", new), loaded("c", None))
    assert {table.pick("app", "").instance.id for _ in range(50)} == {"b", "c"}
    table.delete(old)
    table.put(old)
    assert {table.pick("app", "").instance.id for _ in range(50)} == {"a", "c"}


def test_outdated_instance_that_leaves_is_no_last_resort(table: Table) -> None:
    old, new = with_file("file:///old.tar"), with_file("file:///new.tar")
    table.put(old, loaded("a", old), loaded("b", old))
    table.delete(loaded("a", old))
    assert table.pick("app", "v1").instance.id == "b"
    table.put(new)
    table.delete(loaded("b", old))
    with pytest.raises(Unavailable):
        table.pick("app", "v1")
    assert {each.instance.id for each in table.router.expired()} == {"a", "b"}


def test_router_picks_the_least_loaded_instance_of_a_version(table: Table) -> None:
    table.put(release("v1"), instance("v1", "small", 2), instance("v1", "large", 8))
    picked: Counter[str] = Counter()
    for _ in range(10):
        endpoint = table.pick("app", "v1")
        endpoint.in_flight += 1
        picked[endpoint.instance.id] += 1
        shares = [each / most for each, most in ((picked["small"], 2), (picked["large"], 8))]
        assert max(shares) - min(shares) <= 0.5
    with pytest.raises(ResourceExhausted):
        table.pick("app", "v1")
    assert picked == {"small": 2, "large": 8}


def test_version_of_weight_0_receives_no_unversioned_traffic(table: Table) -> None:
    table.put(release("v1"), release("v2", weight=0), instance("v1", "a"), instance("v2", "b"))
    assert {table.pick("app", "").instance.id for _ in range(200)} == {"a"}
    assert table.pick("app", "v2").instance.id == "b"
    table.put(release("v1", weight=0))
    with pytest.raises(Unavailable, match="weight above 0"):
        table.pick("app", "")


def test_instance_full_of_batches_still_takes_others(table: Table) -> None:
    table.put(release("v1"), instance("v1", "a"))
    route, batched = table.router.route("app", "v1"), Kind(batched=True)
    endpoint = table.router.pick(route, kind=batched)
    table.router.refused(endpoint, batched, full_s=60.0)
    with pytest.raises(ResourceExhausted):
        table.router.pick(route, kind=batched)
    assert table.router.pick(route) is endpoint
    table.router.refused(endpoint, full_s=60.0)
    with pytest.raises(ResourceExhausted):
        table.router.pick(route)
    # One of the gate's own is done.
    with endpoint.hold():
        pass
    assert table.router.pick(route, kind=batched) is table.router.pick(route) is endpoint


def test_instance_that_is_full_no_longer_when_the_reason_is_told_was_ready(table: Table) -> None:
    table.put(release("v1"), instance("v1", "a"))
    endpoint = table.pick("app", "v1")
    for end in range(8):
        # Each look at the clock is later than the one before.
        table.router._clock = count().__next__
        endpoint.full_until = end
        for _ in range(8):
            with suppress(ResourceExhausted):
                assert table.pick("app", "v1") is endpoint


def test_full_app_is_exhausted_and_gives_a_retry_delay(table: Table) -> None:
    table.put(release("v1"), instance("v1", "a", 1))
    with table.pick("app", "").hold(), pytest.raises(ResourceExhausted) as caught:
        table.pick("app", "")
    assert caught.value.retry_after_s
    assert table.pick("app", "").instance.id == "a"


def test_instance_that_left_is_the_last_resort_until_it_refuses_a_request(table: Table) -> None:
    table.put(release("v1"), instance("v1", "a"), instance("v1", "b"))
    table.delete(instance("v1", "a"))
    assert {table.pick("app", "").instance.id for _ in range(50)} == {"b"}
    table.delete(instance("v1", "b"))
    endpoints = {table.pick("app", "") for _ in range(50)}
    assert {each.instance.id for each in endpoints} == {"a", "b"}
    for endpoint in endpoints:
        table.router.refused(endpoint)
    with pytest.raises(Unavailable):
        table.pick("app", "")
    assert {each.connection.address for each in table.router.expired()} == {f"a:{PORT}", f"b:{PORT}"}
    assert table.router.expired() == []


def test_instance_that_left_expires_once_it_is_idle(table: Table) -> None:
    table.put(release("v1"), instance("v1", "a"))
    endpoint = table.pick("app", "")
    table.delete(instance("v1", "a"))
    table.clock.now = LINGER_S + 1
    with endpoint.hold():
        assert table.router.expired() == []
        with pytest.raises(Unavailable):
            table.pick("app", "")
    assert table.router.expired() == [endpoint]


def test_instance_that_left_stays_the_last_resort_while_its_connection_is_up(table: Table) -> None:
    table.put(release("v1"), instance("v1", "a"))
    endpoint = table.pick("app", "")
    endpoint.connection.is_up = True
    table.delete(instance("v1", "a"))
    table.clock.now = 100 * LINGER_S
    assert table.router.expired() == []
    assert table.pick("app", "") is endpoint
    endpoint.connection.is_up = False
    assert table.router.expired() == [endpoint]


def test_instance_that_registers_again_keeps_its_connection(table: Table) -> None:
    table.put(release("v1"), instance("v1", "a"))
    before = table.pick("app", "")
    table.delete(instance("v1", "a"))
    table.put(instance("v1", "a", 9))
    assert table.pick("app", "") is before
    assert before.room() == 9
    table.clock.now = LINGER_S + 1
    assert table.router.expired() == []


def test_instance_with_a_new_address_gets_a_new_connection(table: Table) -> None:
    table.put(release("v1"), instance("v1", "a"))
    before = table.pick("app", "")
    table.put(instance("v1", "a", port=PORT + 1))
    assert table.pick("app", "").connection.address == f"a:{PORT + 1}"
    assert table.router.expired() == [before]


def test_instance_is_ejected_for_a_while_after_its_transport_failed(table: Table) -> None:
    table.put(release("v1"), instance("v1", "a"), instance("v1", "b"))
    failed = table.pick("app", "")
    table.router.failed(failed)
    assert failed not in {table.pick("app", "") for _ in range(50)}
    table.clock.now = EJECT_S + 0.1
    assert failed in {table.pick("app", "") for _ in range(50)}


def test_only_instance_is_picked_even_while_it_is_ejected(table: Table) -> None:
    table.put(release("v1"), instance("v1", "a"))
    table.router.failed(table.pick("app", ""))
    assert table.pick("app", "").instance.id == "a"


def test_most_specific_worker_config_wins_field_by_field(table: Table) -> None:
    def worker(key: str, value: str) -> None:
        found = parse(key, value)
        assert isinstance(found, WorkerConfig)
        table.router.apply({key: found}, set())

    def timeout_s(version: str = "v1") -> float:
        return table.router.route("app", version).timeout_s

    table.put(release("v1"), release("v2"))
    assert timeout_s() == 30
    worker("/ava/serving/worker/default", '{"timeout": 5000000000}')
    assert timeout_s() == 5
    worker("/ava/serving/worker/app/app/default", '{"timeout": "2s"}')
    worker("/ava/serving/worker/app/app/release/v1", '{"max_concurrent": 3}')
    assert timeout_s() == 2
    worker("/ava/serving/worker/app/app/release/v1", '{"timeout": "100ms"}')
    assert timeout_s() == 0.1
    assert timeout_s("v2") == 2
    assert timeout_s("") == 2
    table.router.apply({}, {"/ava/serving/worker/app/app/release/v1"})
    assert timeout_s() == 2


def test_route_carries_the_metadata_of_its_app_and_the_default(table: Table) -> None:
    closed, default = AppMetadata(public=False), AppMetadata(public=True)
    table.put(release("v1"), release("v1", app="other"))
    table.router.apply({"/ava/serving/app/metadata/app": closed, "/ava/serving/app/default/metadata": default}, set())
    app, other = table.router.route("app", ""), table.router.route("other", "v1")
    assert (app.metadata, app.default_metadata) == (closed, default)
    assert (other.metadata, other.default_metadata) == (AppMetadata(), default)


def test_rules_under_an_unknown_key_close_the_apps_that_it_names_until_it_is_deleted(table: Table) -> None:
    opened = {f"/ava/serving/app/metadata/{app}": AppMetadata(public=True) for app in ("app", "other")}
    table.put(release("v1"), release("v1", app="other"))
    table.router.apply(opened, set())
    for key, closed in (("metadta/app", {"app"}), ("acl/other", {"acl", "other"}), ("default/metdata", {""})):
        table.router.apply({f"/ava/serving/app/{key}": CLOSED}, set())
        for app in ("app", "other", "no-such-app"):
            own, default = table.router.rules(app)
            assert (own is CLOSED, default is CLOSED) == (app in closed, "" in closed)
        assert (table.router.route("app", "").metadata is CLOSED) == ("app" in closed)
        table.router.apply({}, {f"/ava/serving/app/{key}"})
        assert CLOSED not in table.router.rules("app")


def test_router_resolves_a_route_once_until_the_config_changes(table: Table) -> None:
    table.put(release("v1"), instance("v1", "a"))
    route = table.router.route("app", "")
    assert table.router.route("app", "") is route
    table.put(release("v1", weight=0.5))
    later = table.router.route("app", "")
    assert later.split
    assert later.split.weights == {"v1": 0.5}
    assert route.split
    assert route.split.weights == {"v1": None}


def route_by(table: Table, **fields: object) -> None:
    table.router.apply({app_routing_key("app"): validate(AppRouting, fields)}, set())


def test_an_alias_reaches_its_version_in_any_phase(table: Table) -> None:
    table.put(release("v1"), release("v2", "staging"), instance("v1", "a"), instance("v2", "b"))
    route_by(table, aliases={"next": "v2", "v1": "v2"})
    assert table.pick("app", "next").instance.id == "b"
    assert table.router.route("app", "next").version == "v2"
    assert table.pick("app", "v1").instance.id == "a", "a version of the same name comes first"
    route_by(table, aliases={"next": "v1"})
    assert table.pick("app", "next").instance.id == "a"
    table.router.apply({}, {app_routing_key("app")})
    with pytest.raises(NotFound, match="app 'app' has no version 'next'"):
        table.router.route("app", "next")


def test_an_alias_of_a_version_that_does_not_exist_is_not_found(table: Table) -> None:
    table.put(release("v1"), instance("v1", "a"))
    route_by(table, aliases={"next": "v9", "again": "next"})
    with pytest.raises(NotFound, match="app 'app' has no version 'v9', which its alias 'next' names"):
        table.router.route("app", "next")
    with pytest.raises(NotFound, match="app 'app' has no version 'next', which its alias 'again' names"):
        table.router.route("app", "again")


def test_an_alias_has_the_timeout_of_its_version(table: Table) -> None:
    table.put(release("v1"), release("v2", "staging"))
    route_by(table, aliases={"next": "v2"})
    key = "/ava/serving/worker/app/app/release/v2"
    table.router.apply({key: parse(key, '{"timeout": "2s"}')}, set())
    assert table.router.route("app", "next").timeout_s == 2


def test_the_routing_of_an_app_names_the_header_of_its_keys(table: Table) -> None:
    table.put(release("v1"))
    assert table.router.route("app", "").key_header == "x-serving-key"
    route_by(table, key_header="x-user")
    assert table.router.route("app", "").key_header == "x-user"


VERSIONS = st.sampled_from(["v1", "v2", "v3"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("release"), VERSIONS, st.sampled_from(["staging", "production"])),
        st.tuples(st.just("delete"), VERSIONS, st.none()),
        st.tuples(st.just("register"), VERSIONS, st.sampled_from("abc")),
        st.tuples(st.just("deregister"), VERSIONS, st.sampled_from("abc")),
        st.tuples(st.just("pick"), st.sampled_from(["", "v1", "v2", "v3"]), st.none()),
        st.tuples(st.just("end"), st.just(""), st.none()),
        st.tuples(st.just("refuse"), st.just(""), st.none()),
        st.tuples(st.just("later"), st.just(""), st.none()),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_only_ready_instances_of_matching_versions_are_picked(
    steps: list[tuple[str, str, str | None]],
) -> None:
    table = Table()
    phases: dict[str, str] = {}
    registered: set[tuple[str, str]] = set()
    picked: list[Endpoint[Connected]] = []
    closed: list[Endpoint[Connected]] = []
    for step, version, detail in steps:
        if step == "release" and detail:
            table.put(release(version, detail))
            phases[version] = detail
        elif step == "delete":
            table.delete(release(version))
            phases.pop(version, None)
        elif step == "register" and detail:
            table.put(instance(version, detail))
            registered.add((version, detail))
        elif step == "deregister" and detail:
            table.delete(instance(version, detail))
            registered.discard((version, detail))
        elif step == "end" and picked:
            picked.pop().in_flight -= 1
        elif step == "refuse" and picked:
            endpoint = picked.pop()
            endpoint.in_flight -= 1
            table.router.refused(endpoint)
        elif step == "later":
            table.clock.now += LINGER_S / 2
            expired = table.router.expired()
            assert not set(expired) & set(closed), "each connection expires once"
            assert all(each.in_flight == 0 for each in expired)
            closed += expired
        elif step == "pick":
            matching = {version} & phases.keys() if version else {v for v, p in phases.items() if p == "production"}
            try:
                endpoint = table.pick("app", version)
            except ServingError as error:
                ready = [each for each in registered if each[0] in matching]
                full = all(sum(u.instance.version == v and u.instance.id == i for u in picked) >= 4 for v, i in ready)
                assert full, f"{error.message}, but {ready} are ready"
                continue
            assert endpoint.instance.version in matching
            assert endpoint not in closed
            assert endpoint.in_flight < endpoint.instance.capacity
            left = (endpoint.instance.version, endpoint.instance.id) not in registered
            assert not (left and any(each[0] == endpoint.instance.version for each in registered))
            endpoint.in_flight += 1
            picked.append(endpoint)


def test_an_instance_that_is_away_is_a_last_resort(table: Table) -> None:
    table.put(release("v1"), instance("v1", "a"), instance("v1", "b", capacity=1))
    route = table.router.route("app", "")
    a = table.pick("app", "")
    endpoints = {"a": a, "b": table.router.pick(route, [a])}
    endpoints["a"].connection.is_away = True
    assert {table.pick("app", "").instance.id for _ in range(50)} == {"b"}
    with endpoints["b"].hold():
        assert table.pick("app", "").instance.id == "a"
    table.router.failed(endpoints["b"])
    assert {table.pick("app", "").instance.id for _ in range(50)} == {"b"}, "an ejected one may be back"
    endpoints["b"].connection.is_away = True
    assert {table.pick("app", "").instance.id for _ in range(50)} == {"a"}, "the other is ejected, too"


def test_a_version_whose_instances_are_away_gets_no_unversioned_traffic(table: Table) -> None:
    table.put(release("v1"), release("v2"), instance("v1", "a"), instance("v2", "b"))
    table.pick("app", "v1").connection.is_away = True
    assert {table.pick("app", "").instance.id for _ in range(50)} == {"b"}
    assert table.pick("app", "v1").instance.id == "a"


def test_an_instance_that_left_and_serves_is_better_than_one_that_is_away(table: Table) -> None:
    table.put(release("v1"), instance("v1", "a"), instance("v1", "b"))
    table.delete(instance("v1", "b"))
    table.pick("app", "").connection.is_away = True
    assert table.pick("app", "").instance.id == "b"


def open_ids(table: Table, *instances: Instance) -> set[str]:
    """Return which of some instances have an open connection."""
    pools = (pool for by_version in (table.router._endpoints, table.router._outdated) for pool in by_version.values())
    known = {endpoint.instance.id: endpoint for pool in pools for endpoint in pool.values()}
    return {each.id for each in instances if known[each.id].opened}


def ask(table: Table, version: str) -> None:
    """Send a request as the gate does."""
    endpoint = table.pick("app", version)
    if endpoint.opened is None:
        table.router.warm(endpoint)
    with endpoint.hold():
        pass


def test_the_first_request_for_a_version_opens_its_connections(table: Table) -> None:
    a, b, c = instance("v1", "a"), instance("v1", "b"), instance("v2", "c")
    table.put(release("v1"), release("v2", "staging"), a, b, c)
    assert not open_ids(table, a, b, c)
    ask(table, "v1")
    assert open_ids(table, a, b, c) == {"a", "b"}
    # Those that come later are opened at once.
    late, other = instance("v1", "late"), instance("v2", "other")
    table.put(late, other)
    assert open_ids(table, late, other) == {"late"}


def test_unused_connections_are_closed_and_opened_again(table: Table) -> None:
    a, b = instance("v1", "a"), instance("v1", "b")
    table.put(release("v1"), a, b)
    ask(table, "v1")
    assert not table.router.idle()
    table.clock.now = IDLE_S - 1
    ask(table, "v1")
    assert not table.router.idle()
    table.clock.now += IDLE_S - 1
    assert not table.router.idle()
    table.clock.now += 1
    assert {each.address for each in table.router.idle()} == {f"a:{PORT}", f"b:{PORT}"}
    assert not open_ids(table, a, b)
    assert not table.router.idle()
    ask(table, "v1")
    assert open_ids(table, a, b) == {"a", "b"}


def test_a_connection_with_a_request_in_flight_stays_open(table: Table) -> None:
    a, b = instance("v1", "a"), instance("v1", "b")
    table.put(release("v1"), a, b)
    ask(table, "v1")
    table.router.idle()
    with table.pick("app", "v1").hold():
        table.router.idle()
        table.clock.now = 10 * IDLE_S
        assert not table.router.idle()
        assert open_ids(table, a, b) == {"a", "b"}
    assert not table.router.idle()
    table.clock.now += IDLE_S
    assert len(table.router.idle()) == 2
