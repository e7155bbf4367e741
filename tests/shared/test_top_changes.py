"""The table of `atserving top` adds up what processes count, between two readings."""

from __future__ import annotations

from collections.abc import Mapping

from atserving.cli.top import tables
from atserving.cli.top.changes import Changes, Load, Reading
from atserving.cli.top.scraping import Scrape, Series, Target

APP = {"app": "a", "version": "v1"}
REQUESTS = "atserving_gate_requests_total"
SECONDS = "atserving_gate_request_seconds_bucket"
STAGES = "atserving_evaluator_stage_seconds_bucket"


def series(name: str, **labels: str) -> Series:
    return Series(name, tuple(sorted(labels.items())))


def gate(requests: dict[str, int], address: str = "g", *, buckets: dict[str, int] | None = None) -> Scrape:
    """Return the counts of a gate by status."""
    values = {series(REQUESTS, **APP, code=code): float(count) for code, count in requests.items()}
    for bound, count in (buckets or {}).items():
        values[series(SECONDS, app="a", le=bound)] = float(count)
    return Scrape(Target(address, address), "gate", values)


def evaluator(address: str, values: Mapping[str, float]) -> Scrape:
    """Return the values of an instance, by their names."""
    return Scrape(
        Target(address, address),
        "evaluator",
        {series(f"atserving_evaluator_{name}", **APP): values[name] for name in values},
    )


def read(*readings: list[Scrape], seconds: float = 2.0) -> Reading:
    changes = Changes()
    found = None
    for number, scrapes in enumerate(readings):
        found = changes.read(scrapes, number * seconds)
    assert found
    return found


def of(reading: Reading, version: str = "", instance: str = "") -> Load:
    return next(each for each in reading.loads if (each.version, each.instance) == (version, instance))


def test_requests_are_summed_over_gates_and_divided_by_the_time() -> None:
    before = [gate({"200": 10, "500": 0}, "g1"), gate({"200": 5}, "g2")]
    after = [gate({"200": 30, "500": 4, "429": 2}, "g1"), gate({"200": 15}, "g2")]
    load = of(read(before, after), "v1")
    assert (load.requests_per_s, load.errors_per_s, load.refused_per_s) == (18.0, 2.0, 1.0)


def test_a_process_that_began_anew_counts_from_zero() -> None:
    assert of(read([gate({"200": 1000})], [gate({"200": 6})]), "v1").requests_per_s == 3.0


def test_a_process_that_is_new_has_its_requests_behind_it() -> None:
    reading = read([gate({"200": 1}, "g1")], [gate({"200": 3}, "g1"), gate({"200": 5000}, "g2")])
    assert of(reading, "v1").requests_per_s == 1.0


def test_a_process_that_was_away_for_a_reading_is_new_again() -> None:
    away = Scrape(Target("g", "g"), failure="it does not answer")
    reading = read([gate({"200": 1})], [away], [gate({"200": 5000})])
    assert of(reading, "v1").requests_per_s == 0.0


def test_quantiles_are_those_of_the_time_between_the_readings() -> None:
    before = gate({"200": 100}, buckets={"0.01": 0, "0.1": 0, "1.0": 100, "+Inf": 100})
    after = gate({"200": 200}, buckets={"0.01": 50, "0.1": 100, "1.0": 200, "+Inf": 200})
    load = of(read([before], [after]))
    assert load.p50_ms == 10.0
    assert load.p99_ms is not None
    assert 97 < load.p99_ms < 100


def test_quantiles_beyond_the_last_bound_are_the_last_bound() -> None:
    before = gate({"200": 0}, buckets={"0.01": 0, "30.0": 0, "+Inf": 0})
    after = gate({"200": 1}, buckets={"0.01": 0, "30.0": 0, "+Inf": 1})
    assert of(read([before], [after])).p50_ms == 30_000


def test_nothing_is_said_of_what_is_not_known() -> None:
    load = of(read([gate({"200": 1})], [gate({"200": 1})]), "v1")
    assert (load.p50_ms, load.queue, load.batch, load.ready) == (None, None, None, None)


def test_instances_of_a_version_are_added_up() -> None:
    values = {"max_concurrent": 64, "requests_in_flight": 3, "queue_length": 1, "worker_restarts_total": 1}
    before = {**values, "batch_size_sum": 10, "batch_size_count": 10}
    after = {**values, "batch_size_sum": 40, "batch_size_count": 20}
    reading = read([evaluator("e1", before), evaluator("e2", before)], [evaluator("e1", after), evaluator("e2", after)])
    version, instance = of(reading, "v1"), of(reading, "v1", "e1")
    assert (version.in_flight, version.capacity, version.queue, version.batch, version.restarts) == (6, 128, 2, 3.0, 2)
    assert (instance.in_flight, instance.capacity, instance.queue, instance.restarts) == (3, 64, 1, 1)


def test_the_least_that_a_gate_can_reach_counts_as_ready() -> None:
    def reaches(address: str, count: float) -> Scrape:
        found = {series("atserving_gate_instances", **APP, state="connected"): count}
        return Scrape(Target(address, address), "gate", found)

    registry = Scrape(Target("r", "r"), "registry", {series("atserving_registry_instances", **APP): 3.0})
    scrapes = [reaches("g1", 3), reaches("g2", 0), registry]
    load = of(read(scrapes, scrapes), "v1")
    assert (load.ready, load.registered) == (0, 3)
    assert tables.is_bad(load)


def test_requests_for_unknown_apps_have_a_line_of_their_own() -> None:
    def unknown(count: float) -> Scrape:
        return Scrape(Target("g", "g"), "gate", {series(REQUESTS, app="", version="", code="404"): count})

    (load,) = read([unknown(0)], [unknown(8)]).loads
    assert (load.app, load.refused_per_s) == ("", 4.0)
    assert tables.rows(read([unknown(0)], [unknown(8)]))[0][1][0] == "(no app)"


def test_warnings_name_what_is_wrong() -> None:
    lonely = Scrape(Target("g", "gate"), "gate", {series("atserving_gate_config_followed"): 0.0})
    stale = Scrape(Target("r", "registry"), "registry", {series("atserving_registry_mirror_stale"): 1.0})
    dead = Scrape(Target("127.0.0.1:1", "gate-1"), failure="Connection refused")
    assert read([], [lonely, stale, dead]).warnings == [
        "gate follows no registry",
        "registry has lost etcd",
        "gate-1 (127.0.0.1:1): Connection refused",
    ]
