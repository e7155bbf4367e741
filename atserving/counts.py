"""Counts in plain numbers, cheap enough for the path of a request; a scrape turns them into Prometheus' families."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.samples import Exemplar, Sample
from prometheus_client.utils import floatToGoString

from atserving.telemetry import trace_context

_MOST_S = 30.0

EXEMPLAR_S = 60.0
"""How long the trace of a greatest value is shown."""


def latency_bounds(least_s: float) -> tuple[float, ...]:
    """Return the upper bounds of the buckets of a latency, from ``least_s`` to 30 s.

    By these, Prometheus is at most 22 % off the 99th percentile of nine in ten common distributions. With the steps 1,
    2 and 5 alone it would be 63 %.
    """
    bounds = (round(step * 10.0**exponent, 5) for exponent in range(-4, 2) for step in (1, 1.5, 2, 3, 5, 7))
    return tuple(each for each in bounds if least_s <= each <= _MOST_S)


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
        self._greatest = self._traced_s = 0.0
        self._trace_id = ""

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def trace(self, value: float, traceparent: str | bytes | None) -> None:
        """Keep the trace of a value that was counted, if it is the greatest of about a minute."""
        if value > self._greatest and traceparent:
            text = traceparent if isinstance(traceparent, str) else traceparent.decode(errors="replace")
            if trace_context(text):
                self._greatest, self._traced_s, self._trace_id = value, time.time(), text[3:35]

    def _exemplar(self) -> Exemplar | None:
        if not self._greatest:
            return None
        if time.time() - self._traced_s > EXEMPLAR_S:
            self._greatest = 0.0
            return None
        return Exemplar({"trace_id": self._trace_id}, self._greatest, self._traced_s)

    def add_to(self, family: HistogramMetricFamily, labels: Mapping[str, str]) -> None:
        """Add the histogram to a family, for a scrape, with the trace of one of its values if there is one.

        It is many samples, which the family's own method takes far longer to make.
        """
        name, samples, exemplar = family.name, family.samples, self._exemplar()
        traced = bisect_left(self._bounds, exemplar.value) if exemplar else -1
        count = 0
        for number, (bound, own) in enumerate(zip(self._names, self._counts, strict=True)):
            count += own
            shown = exemplar if number == traced else None
            samples.append(Sample(f"{name}_bucket", {**labels, "le": bound}, float(count), None, shown))
        samples += (
            Sample(f"{name}_count", {**labels}, float(count)),
            Sample(f"{name}_sum", {**labels}, self._sum),
            Sample(f"{name}_created", {**labels}, self._created_s),
        )
