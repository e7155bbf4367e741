"""The metrics of a gate, in the Prometheus format."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from atserving.process_metrics import add_process
from atserving.tls import Tls
from gate.rate_limit_service import RateLimitService
from gate.shadow import Shadows, upper_s
from gate.turns import Turns

# From 0.1 ms to 30 s, each 1.8 times the one before.
_BOUNDS = {number: str(round(upper_s(number), 6)) for number in range(0, 133, 6)}
_LABELS = ("app", "version", "baseline")


class Metrics(Collector):
    """The metrics of one gate; every name begins with ``atserving_gate_``."""

    def __init__(
        self,
        shadows: Shadows,
        turns: Turns,
        rate_limits: RateLimitService | None = None,
        tls: Tls | None = None,
        others: Iterable[Collector] = (),
    ) -> None:
        """``others`` have the metrics that are not of turns, rate limits, shadows or the process."""
        self._shadows = shadows
        self._turns = turns
        self._rate_limits = rate_limits
        self._writing = asyncio.Lock()
        self._registry = CollectorRegistry()
        for each in (*others, self):
            self._registry.register(each)
        add_process(self._registry, "atserving_gate", tls)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of turns, rate limits and shadows, for a scrape."""
        turns = CounterMetricFamily(
            "atserving_gate_turns",
            "Requests that had to wait until it was their app's turn, or that were too many to wait.",
            labels=["outcome"],
        )
        turns.add_metric(["waited"], self._turns.waited)
        turns.add_metric(["refused"], self._turns.refused)
        yield turns
        yield GaugeMetricFamily(
            "atserving_gate_requests_waiting", "Requests that wait until it is their app's turn.", len(self._turns)
        )
        if self._rate_limits:
            questions = CounterMetricFamily(
                "atserving_gate_rate_limit_questions",
                "Requests for which the rate limit service was asked, or was not, as it is away.",
                labels=["outcome"],
            )
            for outcome in ("allowed", "refused", "failed", "skipped"):
                questions.add_metric([outcome], self._rate_limits.asked[outcome])
            yield questions
        yield from self._comparisons()

    def _comparisons(self) -> Iterator[Metric]:
        copies = CounterMetricFamily(
            "atserving_gate_shadow_copies",
            "Copies of requests to a version in staging, by how its answer compares with the caller's.",
            labels=[*_LABELS, "outcome"],
        )
        slower = CounterMetricFamily(
            "atserving_gate_shadow_slower", "Copies that took far longer than the caller's request.", labels=_LABELS
        )
        seconds = HistogramMetricFamily(
            "atserving_gate_shadow_seconds",
            "The seconds of copies that were answered (of: version), and of the requests themselves (of: baseline).",
            labels=[*_LABELS, "of"],
        )
        for found in self._shadows.found():
            labels = [found.app, found.version, found.baseline]
            for outcome in ("equal", "different", "failed", "dropped"):
                copies.add_metric([*labels, outcome], getattr(found, outcome), created=found.since)
            slower.add_metric(labels, found.slower, created=found.since)
            seconds.add_metric([*labels, "version"], list(_buckets(found.times)), found.seconds)
            seconds.add_metric([*labels, "baseline"], list(_buckets(found.baseline_times)), found.baseline_seconds)
        yield from (copies, slower, seconds)

    async def page(self, accept: str) -> tuple[bytes, str]:
        """Return the text and its content type, in the format of the scraper's Accept header.

        With many apps this takes a while, in which requests go on: each family is a step of its own, and a thread
        writes the text.
        """
        encode, content_type = choose_encoder(accept)
        families = []
        # One at a time: the families of many apps take memory.
        async with self._writing:
            for family in self._registry.collect():
                families.append(family)
                await asyncio.sleep(0)
            return await asyncio.to_thread(encode, _Collected(families)), content_type


class _Collected(CollectorRegistry):
    """The families of one scrape."""

    def __init__(self, families: list[Metric]) -> None:
        super().__init__()
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def _buckets(times: Counter[int]) -> Iterator[tuple[str, float]]:
    """Yield the upper bound of each bucket, and how many times are not above it."""
    for number, name in _BOUNDS.items():
        yield name, float(sum(count for each, count in times.items() if each <= number))
    yield "+Inf", float(times.total())
