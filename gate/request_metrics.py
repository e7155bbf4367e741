"""The metrics of a gate's requests, by app and version, and of the instances that they went to."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gate.connection import EvaluatorConnection
from gate.endpoint import STATES
from gate.request_counts import REFUSALS, RETRIES, AppCounts, RequestCounts
from gate.router import Router

_VERSION = ("app", "version")


class RequestMetrics(Collector):
    """The families of the counts, for a scrape."""

    def __init__(self, counts: RequestCounts, router: Router[EvaluatorConnection]) -> None:
        self._counts = counts
        self._router = router

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        apps = self._counts.all()
        yield from _of_versions(apps)
        yield from _of_apps(apps)
        yield from self._of_router(apps)

    def _of_router(self, apps: list[tuple[str, AppCounts]]) -> Iterator[Metric]:
        asked = GaugeMetricFamily(
            "atserving_gate_split_share",
            "The share of an app's requests without a version that a version should get.",
            labels=_VERSION,
        )
        instances = GaugeMetricFamily(
            "atserving_gate_instances",
            "Instances of the apps that have had requests, by their state in this gate.",
            labels=[*_VERSION, "state"],
        )
        for app, counts in apps:
            for version, share in self._router.shares(app).items():
                asked.add_metric([app, version], share)
            for version in self._router.versions(app):
                states = self._router.states(app, version)
                # An app may have hundreds of old releases.
                if version not in counts.versions and not any(states.values()):
                    continue
                for state in STATES:
                    instances.add_metric([app, version, state], states[state])
        yield from (asked, instances)


def _of_versions(apps: list[tuple[str, AppCounts]]) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "atserving_gate_requests",
        "Requests, and tasks of batches, by the HTTP status of their outcome; 499: the caller has gone.",
        labels=[*_VERSION, "code"],
    )
    attempts = CounterMetricFamily(
        "atserving_gate_attempts", "How often an instance was asked for a request.", labels=[*_VERSION, "instance_id"]
    )
    given = CounterMetricFamily(
        "atserving_gate_split_requests", "Requests without a version that a version has answered.", labels=_VERSION
    )
    unserved = CounterMetricFamily(
        "atserving_gate_requests_without_instance",
        "Requests that found no ready instance of a version that may serve them.",
        labels=_VERSION,
    )
    waiting = GaugeMetricFamily(
        "atserving_gate_requests_waiting_for_instance", "Requests that wait for one.", labels=_VERSION
    )
    for app, counts in apps:
        for version, each in counts.versions.items():
            for code, count in each.codes.items():
                requests.add_metric([app, version, str(code)], count)
            for instance, count in each.picks.items():
                attempts.add_metric([app, version, instance], count)
            if version or each.by_turn:
                given.add_metric([app, version], each.by_turn)
                unserved.add_metric([app, version], each.without_instance)
                waiting.add_metric([app, version], each.waiting)
    yield from (requests, attempts, given, unserved, waiting)


def _of_apps(apps: list[tuple[str, AppCounts]]) -> Iterator[Metric]:
    seconds = HistogramMetricFamily(
        "atserving_gate_request_seconds", "The seconds of requests that were not refused.", labels=["app"]
    )
    in_flight = GaugeMetricFamily("atserving_gate_requests_in_flight", "Requests without an answer.", labels=["app"])
    refusals = CounterMetricFamily(
        "atserving_gate_refusals", "Requests that the gate itself has refused.", labels=["app", "reason"]
    )
    retries = CounterMetricFamily(
        "atserving_gate_retries", "Attempts beyond the first of a request.", labels=["app", "cause"]
    )
    for app, counts in apps:
        if app:
            counts.times.add_to(seconds, {"app": app})
            in_flight.add_metric([app], counts.in_flight)
        # Those of an app appear with their first; one series of each is there from the start.
        for reason in REFUSALS if not app else counts.refusals:
            refusals.add_metric([app, reason], counts.refusals[reason])
        for cause in RETRIES if not app else counts.retries:
            retries.add_metric([app, cause], counts.retries[cause])
    yield from (seconds, in_flight, refusals, retries)
