"""Counts in plain numbers, cheap enough for the path of a request; a scrape turns them into Prometheus' families."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.samples import Exemplar, Sample
from prometheus_client.utils import floatToGoString


class Counts:
    """A counter for each value of a label."""

    def __init__(self) -> None:
        self._values: dict[object, float] = {}
        self._created_s: dict[object, float] = {}

    def add(self, label: object) -> None:
        """Count one."""
        if label in self._values:
            self._values[label] += 1
        else:
            self._values[label] = 1
            self._created_s[label] = time.time()

    def family(self, name: str, text: str, label: str) -> CounterMetricFamily:
        """Return the counters for a scrape."""
        family = CounterMetricFamily(name, text, labels=[label])
        for value, count in self._values.items():
            family.add_metric([str(value)], count, created=self._created_s[value])
        return family


class Distribution:
    """A histogram."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """``bounds`` are the upper bounds of its buckets, in order; above the last there is one more."""
        self._bounds = bounds
        self._names = [*map(floatToGoString, bounds), "+Inf"]
        self._counts = [0] * len(self._names)
        self._sum = 0.0
        self._created_s = time.time()

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(
        self, family: HistogramMetricFamily, labels: Mapping[str, str], exemplar: Exemplar | None = None
    ) -> None:
        """Add the histogram to a family, for a scrape; ``exemplar`` is one of its values."""
        buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = list(self._buckets())
        if exemplar:
            at = bisect_left(self._bounds, exemplar.value)
            name, count, *_ = buckets[at]
            buckets[at] = (name, count, exemplar)
        family.add_metric(list(labels.values()), buckets, self._sum)
        family.samples.append(Sample(f"{family.name}_created", dict(labels), self._created_s))

    def _buckets(self) -> Iterable[tuple[str, float]]:
        count = 0
        for name, own in zip(self._names, self._counts, strict=True):
            count += own
            yield name, float(count)
