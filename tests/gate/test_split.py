"""Versions take turns by exact shares, keys stay on a version, and one that was full makes up for its turns."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from atserving.config import Release
from atserving.errors import ResourceExhausted, ServingError, Unavailable
from gate.endpoint import Endpoint, Kind
from gate.split import MOST_OWED, Split
from tests.gate.test_router import Connected, Table, instance, release

VERSIONS = ("v1", "v2", "v3", "v4")
WEIGHTS = st.one_of(st.sampled_from([0.0, 0.1, 0.25, 1.0, 3.0, 5e-324, 1e6]), st.floats(0, 1e6))


def put_versions(table: Table, weights: dict[str, float | None], capacity: int = 4) -> None:
    for version, weight in weights.items():
        table.put(release(version, weight=weight), instance(version, f"{version}-a", capacity))


def pick(table: Table, key: bytes = b"", kind: Kind = Kind()) -> str:  # noqa: B008 - it is immutable
    return table.router.pick(table.router.route("app", ""), kind=kind, key=key).instance.version


def picks(table: Table, count: int, key: bytes = b"") -> Counter[str]:
    return Counter(pick(table, key) for _ in range(count))


class Windows:
    """The requests of each version, beside its share, while the same versions are ready."""

    def __init__(self) -> None:
        self._owed: dict[str, Fraction] = {}
        self._least: dict[str, Fraction] = {}
        self._most: dict[str, Fraction] = {}
        self._carried = False

    def add(self, version: str, parts: dict[str, Fraction]) -> None:
        if parts.keys() != self._owed.keys():
            # What they owe each other goes on when others join or leave.
            self._carried = bool(self._owed)
            self._owed, self._least, self._most = ({each: Fraction() for each in parts} for _ in range(3))
        bound, since = (1 if len(parts) < 3 and not self._carried else 2), (2 if self._carried else 1)
        for each, part in parts.items():
            owed = self._owed[each] + part / sum(parts.values()) - (each == version)
            self._owed[each] = owed
            self._least[each], self._most[each] = min(self._least[each], owed), max(self._most[each], owed)
            assert abs(owed) <= since + Fraction(1, 10**5), "since the versions are ready"
            assert self._most[each] - self._least[each] <= bound + Fraction(1, 10**5), "in any window"


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(dict.fromkeys(VERSIONS[:2], WEIGHTS), optional=dict.fromkeys(VERSIONS[2:], WEIGHTS)),
    st.booleans(),
    st.integers(0, 1 << 32),
)
def test_every_window_of_requests_has_the_shares_of_the_versions(
    weights: dict[str, float], weighted: bool, seed: int
) -> None:
    table, windows, rng = Table(), Windows(), random.Random(seed)
    up = {version: {"a": 4} for version in weights}
    put_versions(table, {version: weight if weighted else None for version, weight in weights.items()})
    for _ in range(150):
        version, id_ = rng.choice(list(weights)), rng.choice("abc")
        if rng.random() < 0.03 and sum(map(len, up.values())) > 1 and up[version].pop(id_, 0):
            table.delete(instance(version, f"{version}-{id_}"))
            # One that has left would be a last resort until it refuses a request.
            for each in list(table.router._left["app", version].values()):
                table.router.refused(each)
        elif rng.random() < 0.03 and id_ not in up[version]:
            up[version][id_] = rng.randint(2, 40)
            table.put(instance(version, f"{version}-{id_}", up[version][id_]))
        parts = {
            each: Fraction(repr(weights[each])) if weighted else Fraction(sum(found.values()))
            for each, found in up.items()
            if found and (weights[each] or not weighted)
        }
        # Any load, but no version is full.
        for pool in table.router._endpoints.values():
            for one in pool.values():
                one.in_flight = rng.randrange(one.instance.capacity)
        try:
            endpoint = table.pick("app", "")
        except Unavailable:
            assert not parts
            continue
        windows.add(endpoint.instance.version, parts)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"v1": 0.9, "v2": 0.1}, {"v1": 90, "v2": 10}),
        ({"v1": None, "v2": 0.25}, {"v1": 80, "v2": 20}),
        ({"v1": 0.5, "v2": 0.3, "v3": 0.2}, {"v1": 50, "v2": 30, "v3": 20}),
        ({"v1": 1.0, "v2": 0.0}, {"v1": 100}),
    ],
)
def test_a_hundred_requests_have_the_weights_shares(
    table: Table, weights: dict[str, float | None], expected: dict[str, int]
) -> None:
    put_versions(table, weights)
    for _ in range(3):
        assert picks(table, 100) == expected


@pytest.mark.parametrize("every", [7, 10, 20, 40, 50])
def test_a_rare_version_gets_its_share_while_another_comes_and_goes(every: int) -> None:
    split, got = Split("app", {"v1": 98.0, "v2": 1.0, "v3": 1.0}), Counter[int]()
    for number in range(10_000):
        capacities = [4, 4, 4 if number // every % 2 else 0]
        got[split.take(capacities, [[1] if each else [] for each in capacities])] += 1
    assert 98 <= got[1] <= 103
    assert 47 <= got[2] <= 53


@pytest.mark.parametrize("versions", [3, 6, 10])
def test_many_versions_have_their_shares_since_the_first_request(versions: int) -> None:
    rng = random.Random(versions)
    for _ in range(30):
        weights = {f"v{number}": float(rng.choice([1, 2, 3, 5, 10, 50, 90])) for number in range(versions)}
        split, windows = Split("app", weights), Windows()
        for _ in range(150):
            index = split.take([4] * versions, [[1]] * versions)
            windows.add(split.versions[index], {name: Fraction(weight) for name, weight in weights.items()})


def test_without_weights_shares_follow_the_capacity_of_the_ready_instances(table: Table) -> None:
    put_versions(table, {"v1": None, "v2": None}, capacity=10)
    table.put(instance("v1", "b", 20), release("v3"), instance("v3", "c", 40))
    table.pick("app", "v3").in_flight = 39
    assert picks(table, 80) == {"v1": 30, "v2": 10, "v3": 40}
    table.delete(instance("v1", "b", 20))
    assert picks(table, 60) == {"v1": 10, "v2": 10, "v3": 40}


def test_turns_go_on_when_other_config_changes(table: Table) -> None:
    put_versions(table, {"v1": 0.9, "v2": 0.1})
    picked: Counter[str] = Counter()
    for number in range(100):
        picked[pick(table)] += 1
        other = release("v1", app="other", weight=number)
        table.put(other, release("v9", "staging"), instance("v1", f"more-{number}"), instance("v2", "v2-a", 4 + number))
    assert picked == {"v1": 90, "v2": 10}


def test_a_version_without_a_ready_instance_gives_its_share_to_the_others(table: Table) -> None:
    put_versions(table, {"v1": 2.0, "v2": 1.0, "v3": 1.0})
    split = table.router.route("app", "").split
    assert split
    with capture_logs() as logs:
        picks(table, 4)
        table.pick("app", "v3").connection.is_away = True
        assert picks(table, 30) == {"v1": 20, "v2": 10}
        assert split.unready == ("v3",)
        table.pick("app", "v3").connection.is_away = False
        assert picks(table, 40) == {"v1": 20, "v2": 10, "v3": 10}
    assert not split.unready
    assert logs == [
        {"event": "version unready", "log_level": "warning", "app": "app", "version": "v3"},
        {"event": "version ready", "log_level": "info", "app": "app", "version": "v3"},
    ]


def test_turns_of_two_versions_go_on_after_one_was_alone(table: Table) -> None:
    put_versions(table, {"v1": 0.75, "v2": 0.25})
    one = table.pick("app", "v2")
    picked: Counter[str] = Counter()
    for _ in range(100):
        picked[pick(table)] += 1
        one.connection.is_away = True
        assert pick(table) == "v1"
        one.connection.is_away = False
    assert picked == {"v1": 75, "v2": 25}


@settings(max_examples=40, deadline=None)
@given(
    st.fixed_dictionaries({"v1": WEIGHTS, "v2": WEIGHTS, "v3": WEIGHTS}).filter(lambda found: any(found.values())),
    st.integers(0, 1 << 32),
)
def test_no_request_is_refused_while_a_version_has_room(weights: dict[str, float], seed: int) -> None:
    table, rng = Table(), random.Random(seed)
    put_versions(table, dict(weights), capacity=2)
    held: list[Endpoint[Connected]] = []
    serving = [version for version, weight in weights.items() if weight]
    for _ in range(200):
        if held and rng.random() < 0.45:
            held.pop(rng.randrange(len(held))).in_flight -= 1
        room = sum(table.router._endpoints["app", each][f"{each}-a"].room() for each in serving)
        try:
            endpoint = table.pick("app", "")
        except ResourceExhausted:
            assert not room
            continue
        endpoint.in_flight += 1
        held.append(endpoint)


@pytest.mark.parametrize("weights", [{"v1": 1.0, "v2": 1.0}, {"v1": 5.0, "v2": 3.0, "v3": 2.0}])
def test_a_version_that_was_full_makes_up_for_its_turns(table: Table, weights: dict[str, float | None]) -> None:
    put_versions(table, weights)
    full = table.pick("app", "v2")
    full.in_flight = 4
    picked = picks(table, 100)
    assert not picked["v2"]
    rest = {version: weight for version, weight in weights.items() if version != "v2" and weight}
    for version, weight in rest.items():
        assert picked[version] == pytest.approx(100 * weight / sum(rest.values()), abs=2), "as the others share"
    full.in_flight = 0
    picked += picks(table, 100)
    whole = sum(weight or 0 for weight in weights.values())
    assert picked == {version: 200 * (weight or 0) / whole for version, weight in weights.items()}


def test_a_version_that_was_full_for_long_makes_up_for_a_bounded_number(table: Table) -> None:
    put_versions(table, {"v1": 2.0, "v2": 1.0, "v3": 1.0})
    full = table.pick("app", "v2")
    full.in_flight = 4
    picked = picks(table, 9000)
    assert picked == {"v1": pytest.approx(6000, abs=2), "v3": pytest.approx(3000, abs=2)}
    full.in_flight = 0
    assert picks(table, MOST_OWED - 1) == {"v2": MOST_OWED - 1}
    picked = picks(table, 4000)
    assert picked["v2"] == pytest.approx(1000, abs=MOST_OWED // 3)
    assert picks(table, 400) == {"v1": 200, "v2": 100, "v3": 100}


def test_a_version_full_of_batches_keeps_its_share_of_others(table: Table) -> None:
    put_versions(table, {"v1": 1.0, "v2": 1.0})
    table.pick("app", "v2").in_flight = 3
    assert pick(table, kind=Kind(batched=True)) == pick(table, kind=Kind(batched=True)) == "v1"
    assert picks(table, 2) == {"v2": 2}
    assert pick(table, kind=Kind(fetches=True)) != pick(table, kind=Kind(fetches=True))


def test_retries_and_hedges_take_no_turns(table: Table) -> None:
    put_versions(table, {"v1": 2.0, "v2": 1.0})
    table.put(instance("v1", "v1-b"))
    route = table.router.route("app", "")
    picked: Counter[str] = Counter()
    for _ in range(30):
        endpoint = table.router.pick(route)
        version = endpoint.instance.version
        picked[version] += 1
        other = table.router.pick(route, [endpoint], turn=version)
        assert (other.instance.version == version) == (version == "v1"), "another instance of the version comes first"
        spare = table.router.spare(route, [endpoint], Kind())
        assert spare
        assert spare is not endpoint
    assert picked == {"v1": 20, "v2": 10}


def test_an_instance_that_is_away_serves_while_the_others_are_full(table: Table) -> None:
    put_versions(table, {"v1": 1.0, "v2": 1.0, "v3": 1.0})
    table.pick("app", "v3").connection.is_away = True
    endpoints = [table.pick("app", version) for version in ("v1", "v2")]
    with capture_logs() as logs:
        assert picks(table, 4) == {"v1": 2, "v2": 2}
        for each in endpoints:
            each.in_flight = 4
        assert pick(table) == "v3"
        for each in endpoints:
            each.in_flight = 0
        assert picks(table, 4) == {"v1": 2, "v2": 2}
    assert len(logs) == 1


KEYS = [f"user-{number}".encode() for number in range(2000)]


def test_a_key_has_the_same_version_in_every_process() -> None:
    orders = [Split("app", {"v1": 0.5, "v2": 0.3, "v3": 0.2}).of_key(key) for key in (b"a", b"b", "ü".encode(), b"d")]
    assert orders == [["v1", "v2", "v3"], ["v3", "v1", "v2"], ["v2", "v1", "v3"], ["v2", "v1", "v3"]]


def test_keys_have_the_shares_of_the_weights() -> None:
    split = Split("app", {"v1": 0.7, "v2": 0.3})
    found = Counter(split.of_key(key)[0] for key in KEYS)
    assert found["v2"] == pytest.approx(600, abs=60)
    other = Split("other", {"v1": 0.7, "v2": 0.3})
    assert [other.of_key(key)[0] for key in KEYS] != [split.of_key(key)[0] for key in KEYS]


@settings(max_examples=30, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(VERSIONS, st.floats(0.01, 100))), st.floats(1.0, 10))
def test_a_larger_weight_moves_keys_to_its_version_only(weights: dict[str, float], factor: float) -> None:
    before, after = Split("app", weights), Split("app", {**weights, "v2": weights["v2"] * factor})
    for key in KEYS[:200]:
        first, second = before.of_key(key)[0], after.of_key(key)[0]
        assert second in (first, "v2")


def test_a_key_stays_on_its_version_whatever_the_loads(table: Table) -> None:
    put_versions(table, {"v1": 3.0, "v2": 1.0})
    split = table.router.route("app", "").split
    assert split
    for key in KEYS[:50]:
        version = split.of_key(key)[0]
        assert picks(table, 5, key) == {version: 5}
        endpoint = table.pick("app", version)
        endpoint.in_flight = 4
        with pytest.raises(ResourceExhausted, match=f"version '{version}' of app 'app', which has this key, is full"):
            pick(table, key)
        endpoint.in_flight = 0
    assert picks(table, 40) == {"v1": 30, "v2": 10}, "keys take no turns"


def test_a_key_falls_to_its_next_version_while_its_own_has_no_ready_instance(table: Table) -> None:
    put_versions(table, {"v1": 1.0, "v2": 1.0, "v3": 1.0})
    split = table.router.route("app", "").split
    assert split
    key = next(key for key in KEYS if split.of_key(key) == ["v2", "v3", "v1"])
    table.pick("app", "v2").connection.is_away = True
    assert pick(table, key) == "v3"
    table.pick("app", "v3").connection.is_away = True
    assert pick(table, key) == "v1"
    table.pick("app", "v1").connection.is_away = True
    assert pick(table, key) == "v2"
    for version in VERSIONS[:3]:
        table.delete(instance(version, f"{version}-a"))
        table.router.refused(table.pick("app", version))
    with pytest.raises(Unavailable, match="no instance of"):
        pick(table, key)


def test_a_retry_of_a_key_leaves_its_version_only_if_no_other_instance_is_ready(table: Table) -> None:
    put_versions(table, {"v1": 1.0, "v2": 1.0})
    table.put(instance("v2", "v2-b"))
    route = table.router.route("app", "")
    assert route.split
    key = next(key for key in KEYS if route.split.of_key(key)[0] == "v2")
    first = table.router.pick(route, key=key)
    second = table.router.pick(route, [first], key=key, turn="v2")
    assert {first.instance.id, second.instance.id} == {"v2-a", "v2-b"}
    assert table.router.pick(route, [first, second], key=key, turn="v2").instance.version == "v1"
    assert table.router.spare(route, [second, first], Kind(), key) is None
    first.in_flight = second.in_flight = 4
    with pytest.raises(ServingError, match="no instance of version 'v2' of app 'app', which has this key, is ready"):
        table.router.pick(route, [first, second], key=key, turn="v2")


def test_an_app_of_production_without_weight_answers_no_key(table: Table) -> None:
    put_versions(table, {"v1": 0.0, "v2": 0.0})
    for key in (b"", b"key"):
        with pytest.raises(ServingError, match="weight above 0"):
            pick(table, key)


def test_a_version_that_leaves_production_takes_no_turn(table: Table) -> None:
    put_versions(table, {"v1": 0.5, "v2": 0.5})
    assert picks(table, 10) == {"v1": 5, "v2": 5}
    table.put(release("v1", "staging"))
    assert picks(table, 10) == {"v2": 10}
    gone: Release = release("v2")
    table.delete(gone)
    with pytest.raises(Unavailable):
        pick(table)


@pytest.fixture
def table() -> Table:
    return Table()
