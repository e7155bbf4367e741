"""Find what has changed between two readings of the metrics, by app, version and instance."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from atserving.cli.top.scraping import Scrape, Series

_ERROR = 500
_REFUSED = 400
_READY_STATES = ("connected", "unused")

# An app, a version of it, or an instance of that.
_Scope = tuple[str, ...]
# The name of a metric, and the status or the bound of a bucket that belongs to it.
_Name = tuple[str, str]


@dataclass
class Load:
    """The work of an app, a version or an instance between two readings, and its state at the second.

    A field without a value is None: quantiles without a request, and the work of instances whose metrics are not read.
    """

    app: str
    version: str = ""
    instance: str = ""
    requests_per_s: float = 0.0
    errors_per_s: float = 0.0
    """Requests with a status of 500 or above."""
    refused_per_s: float = 0.0
    """Those with one from 400 to 499."""
    p50_ms: float | None = None
    p99_ms: float | None = None
    in_flight: int | None = None
    capacity: int | None = None
    queue: int | None = None
    batch: float | None = None
    """The mean size of the batches."""
    ready: int | None = None
    """The instances that a gate has in reach; of several gates the least."""
    registered: int | None = None
    restarts: int | None = None
    """Of the worker, since the start of the instance."""


@dataclass
class Reading:
    """The state of the mesh at one time."""

    seconds: float
    """The time since the reading before."""
    processes: dict[str, int] = field(default_factory=dict)
    """How many of each kind have answered."""
    warnings: list[str] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    """Those of each app, followed by its versions, and each version by its instances."""


class Changes:
    """Compares each reading with the one before. A counter that fell has begun anew, with its process."""

    def __init__(self) -> None:
        self._before: dict[str, Mapping[Series, float]] = {}
        self._at_s: float | None = None

    def read(self, scrapes: Sequence[Scrape], now_s: float) -> Reading | None:
        """Return what has happened since the last call; None at the first one."""
        before, at_s = self._before, self._at_s
        self._at_s = now_s
        self._before = {each.target.address: each.values for each in scrapes if not each.failure}
        if at_s is None:
            return None
        return _reading(scrapes, before, now_s - at_s)


class _Sums:
    """Sums of what several processes tell, by app, version and instance."""

    def __init__(self, scrapes: Iterable[Scrape], before: Mapping[str, Mapping[Series, float]]) -> None:
        self.now: dict[_Scope, dict[_Name, float]] = defaultdict(lambda: defaultdict(float))
        """Of gauges, and of counters since the start of their processes."""
        self.since: dict[_Scope, dict[_Name, float]] = defaultdict(lambda: defaultdict(float))
        """Of counters, since the reading before."""
        for each in scrapes:
            old = before.get(each.target.address)
            for series, value in each.values.items():
                labels = dict(series.labels)
                app, version = labels.get("app", ""), labels.get("version", "")
                name = (series.name.removeprefix("atserving_"), labels.get("code") or labels.get("le", ""))
                scopes: set[_Scope] = {(app,), (app, version)}
                if each.kind == "evaluator":
                    scopes.add((app, version, each.target.name))
                # A process that was not there before has all its requests behind it.
                known = value if old is None else old.get(series, 0.0)
                change = value - known if value >= known else value
                for scope in scopes:
                    self.now[scope][name] += value
                    self.since[scope][name] += change


def _reading(scrapes: Sequence[Scrape], before: Mapping[str, Mapping[Series, float]], seconds: float) -> Reading:
    reading = Reading(seconds, _processes(scrapes), list(_warnings(scrapes)))
    sums = _Sums(scrapes, before)
    instances = _instances(scrapes)
    by = "gate" if reading.processes["gate"] else "evaluator"
    versions: dict[str, set[str]] = defaultdict(set)
    for app, version in {each[:2] for each in sums.now if len(each) > 1} | set(instances):
        versions[app].add(version)
    scopes: dict[_Scope, list[_Scope]] = defaultdict(list)
    for scope in sums.now:
        scopes[scope[:2]].append(scope)
    for app in sorted(versions):
        load = _load(sums, (app,), seconds, by)
        if not app:
            # Requests for no known app.
            if load.requests_per_s:
                reading.loads.append(load)
            continue
        reading.loads.append(load)
        for version in sorted(versions[app] - {""}):
            load = _load(sums, (app, version), seconds, by)
            load.ready, load.registered = instances.get((app, version), (None, None))
            reading.loads.append(load)
            for scope in sorted(each for each in scopes[app, version] if len(each) == 3):
                reading.loads.append(_load(sums, scope, seconds, "evaluator"))
    return reading


def _load(sums: _Sums, scope: _Scope, seconds: float, by: str) -> Load:
    """Return the load of an app, version or instance, whose requests are counted by gates or evaluators."""
    since, now = sums.since[scope], sums.now[scope]
    app, version, instance = (*scope, "", "")[:3]
    load = Load(app, version, instance)
    for (name, code), count in since.items():
        if name == f"{by}_requests_total":
            rate = count / seconds
            load.requests_per_s += rate
            if int(code) >= _ERROR:
                load.errors_per_s += rate
            elif int(code) >= _REFUSED:
                load.refused_per_s += rate
    # Gates have the times of whole apps; those of versions are their instances'.
    whole = len(scope) == 1 and by == "gate"
    buckets = "gate_request_seconds_bucket" if whole else "evaluator_stage_seconds_bucket"
    load.p50_ms, load.p99_ms = (_quantile(since, buckets, share) for share in (0.5, 0.99))
    if ("evaluator_max_concurrent", "") in now:
        load.capacity = int(now["evaluator_max_concurrent", ""])
        load.in_flight = int(now["evaluator_requests_in_flight", ""])
        load.queue = int(now["evaluator_queue_length", ""])
        load.restarts = int(now["evaluator_worker_restarts_total", ""])
        if batches := since["evaluator_batch_size_count", ""]:
            load.batch = since["evaluator_batch_size_sum", ""] / batches
    if whole:
        load.in_flight = int(now["gate_requests_in_flight", ""])
    return load


def _quantile(since: Mapping[_Name, float], metric: str, share: float) -> float | None:
    """Return about the milliseconds within which a share of the requests ended, as Prometheus does."""
    buckets = sorted((float(bound), count) for (name, bound), count in since.items() if name == metric)
    total = buckets[-1][1] if buckets else 0.0
    if not total:
        return None
    low_s, below = 0.0, 0.0
    for upper_s, count in buckets:
        if count >= share * total and count > below:
            if math.isinf(upper_s):
                break
            return (low_s + (upper_s - low_s) * (share * total - below) / (count - below)) * 1000
        low_s, below = upper_s, count
    return low_s * 1000


def _instances(scrapes: Sequence[Scrape]) -> dict[tuple[str, str], tuple[int | None, int | None]]:
    """Return how many instances of each version are in reach, and how many are registered."""
    ready: dict[tuple[str, str], int] = {}
    registered: dict[tuple[str, str], int] = {}
    for each in scrapes:
        of_gate: dict[tuple[str, str], int] = defaultdict(int)
        for series, value in each.values.items():
            labels = dict(series.labels)
            version = (labels.get("app", ""), labels.get("version", ""))
            if series.name == "atserving_registry_instances" and all(version):
                registered[version] = max(registered.get(version, 0), int(value))
            elif series.name == "atserving_gate_instances":
                of_gate[version] += int(value) if labels.get("state") in _READY_STATES else 0
        for version, count in of_gate.items():
            ready[version] = min(ready.get(version, count), count)
    return {each: (ready.get(each), registered.get(each)) for each in {*ready, *registered}}


def _processes(scrapes: Sequence[Scrape]) -> dict[str, int]:
    found = {"gate": 0, "registry": 0, "evaluator": 0}
    for each in scrapes:
        if each.kind:
            found[each.kind] += 1
    return found


def _warnings(scrapes: Sequence[Scrape]) -> Iterator[str]:
    for each in scrapes:
        if each.failure:
            yield f"{each.target.name} ({each.target.address}): {each.failure}"
        elif not each.kind:
            yield f"{each.target.name} ({each.target.address}): it is no gate, evaluator or registry"
        elif each.values.get(Series("atserving_gate_config_followed", ())) == 0:
            yield f"{each.target.name} follows no registry"
        elif each.values.get(Series("atserving_registry_mirror_stale", ())) == 1:
            yield f"{each.target.name} has lost etcd"


def as_json(reading: Reading) -> dict[str, Any]:
    """Return a reading for programs; what is not known is left out."""
    loads = [
        {
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in vars(load).items()
            if value not in (None, "")
        }
        for load in reading.loads
    ]
    return {
        "seconds": round(reading.seconds, 3),
        "processes": reading.processes,
        "warnings": reading.warnings,
        "loads": loads,
    }
