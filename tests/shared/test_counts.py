"""A scrape shows the counts exactly as Prometheus' own client shows its counters and histograms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from atserving.counts import Counts, Distribution, latency_bounds

BOUNDS = (0.0005, 0.1, 1.0, 30.0)
VALUES = st.lists(st.one_of(st.sampled_from(BOUNDS), st.floats(0, 100)), max_size=20)


class Own(Collector):
    def __init__(self, statuses: list[int], values: dict[str, list[float]]) -> None:
        self._counts = Counts()
        self._distributions = {name: Distribution(BOUNDS) for name in values}
        for status in statuses:
            self._counts.add(status)
        for name, distribution in self._distributions.items():
            for value in values[name]:
                distribution.observe(value)

    def collect(self) -> Iterator[Metric]:
        yield self._counts.family("requests", "Requests.", "status")
        family = HistogramMetricFamily("seconds", "Seconds.", labels=["stage"])
        for name, distribution in self._distributions.items():
            distribution.add_to(family, {"stage": name})
        yield family


@given(st.lists(st.sampled_from([200, 429, 499])), VALUES, VALUES)
def test_exposition_is_that_of_the_client_library(statuses: list[int], fetch: list[float], total: list[float]) -> None:
    values = {"fetch": fetch, "total": total}
    usual, own = CollectorRegistry(), CollectorRegistry()
    requests = Counter("requests", "Requests.", ["status"], registry=usual)
    for status in statuses:
        requests.labels(str(status)).inc()
    seconds = Histogram("seconds", "Seconds.", ["stage"], buckets=BOUNDS, registry=usual)
    for name, each in values.items():
        child = seconds.labels(name)
        for value in each:
            child.observe(value)
    own.register(Own(statuses, values))
    assert without_times(generate_latest(own)) == without_times(generate_latest(usual))


def test_latencies_have_close_bounds_and_round_ones() -> None:
    bounds = latency_bounds(0.001)
    assert (bounds[0], bounds[-1]) == (0.001, 30.0)
    assert max(after / before for before, after in pairwise(bounds)) < 1.67
    # Alerts on latency need one at what they promise.
    assert {0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0} <= set(bounds)
    assert len(bounds) < 30


def without_times(text: bytes) -> str:
    return re.sub(r"(_created.*) \S+", r"\1", text.decode())
