"""The metrics of a registry, in the Prometheus format. Others count in plain numbers; a scrape collects them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from atserving.counts import Distribution, latency_bounds
from atserving.errors import PermissionDenied, Unauthenticated
from atserving.process_metrics import add_process
from atserving.tls import Tls
from registry.admin.history import Recorder
from registry.etcd import KINDS, OK, CallCounts
from registry.instances import Instances
from registry.mirror import Mirror

_PREFIX = "atserving_registry"
_SECONDS = latency_bounds(0.001)
_REFUSALS = (Unauthenticated.status, PermissionDenied.status)
_HEARTBEATS = ("RegisterInstance", "DeregisterInstance")
_LEFT = 499


class Calls:
    """Counts the calls of the registry's services, by their methods, which are few."""

    def __init__(self) -> None:
        self.ended: Counter[tuple[str, int]] = Counter()
        """By the method and the HTTP status; 499: the caller has left."""
        self.seconds: dict[str, Distribution] = {}

    def observe(self, method: str, status: int, seconds: float | None) -> None:
        """Count a call that has ended; a stream has no ``seconds``."""
        self.ended[method, status] += 1
        if seconds is not None:
            if method not in self.seconds:
                self.seconds[method] = Distribution(_SECONDS)
            self.seconds[method].observe(seconds)

    def with_status(self, methods: Collection[str], status: int) -> int:
        """Return how many calls of some methods had a status."""
        return sum(self.ended[method, status] for method in methods)


class Metrics(Collector):
    """The metrics of one registry; every name begins with ``atserving_registry_``."""

    def __init__(
        self,
        mirror: Mirror,
        instances: Instances,
        recorder: Recorder,
        etcd: CallCounts,
        calls: Calls,
        operating: Collection[str],
        tls: Tls | None = None,
    ) -> None:
        """``operating`` are the methods of the API for operators."""
        self._mirror, self._view = mirror, mirror.view
        self._instances = instances
        self._recorder = recorder
        self._etcd = etcd
        self._calls = calls
        self._operating = operating
        self._registry = CollectorRegistry()
        self._registry.register(self)
        add_process(self._registry, _PREFIX, tls)

    def expose(self, accept: str) -> tuple[bytes, str]:
        """Return the text and its content type, in the format of the scraper's Accept header."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def collect(self) -> Iterator[Metric]:
        """Yield all but the metrics of the process, for a scrape."""
        yield from self._of_mirror()
        yield from self._of_followers()
        yield from self._of_instances()
        yield from self._of_calls()
        yield from self._of_etcd()
        yield from self._of_history()

    def _of_mirror(self) -> Iterator[Metric]:
        mirror, view = self._mirror, self._view
        yield _gauge("mirror_revision", "The revision of etcd that is served.", view.revision)
        yield _gauge("mirror_etcd_revision", "The revision of etcd, as it was last heard.", mirror.etcd_revision)
        yield _gauge("mirror_lag_seconds", "The time since the last proof that the mirror is current.", mirror.lag_s)
        yield _gauge("mirror_stale", "1 while no watch of etcd runs.", bool(mirror.reason))
        yield _counter("mirror_snapshots", "Snapshots of etcd that were taken.", mirror.snapshots)
        yield _counter("mirror_steps", "Atomic steps of etcd that were taken after them.", mirror.steps)
        yield _counter("mirror_events", "Events of etcd in these steps.", mirror.events)
        yield _gauge("config_keys", "Keys that are served.", len(view.entries))
        yield _gauge("config_bytes", "The bytes of their values.", view.inventory.size)
        yield _gauge("config_malformed_keys", "Keys of etcd whose value is malformed.", mirror.malformed)
        yield _gauge("config_held_keys", "Keys whose deletion is held back.", len(view.holdback.held))

    def _of_followers(self) -> Iterator[Metric]:
        followers = GaugeMetricFamily(f"{_PREFIX}_followers", "Streams that follow the config.", labels=["kind"])
        kinds = Counter(each.kind for each in self._view.subscriptions)
        for kind in ("gate", "evaluator", "operator"):
            followers.add_metric([kind], kinds[kind])
        yield followers
        yield _counter(
            "followers_behind", "Followers that were too slow, and receive a new snapshot.", self._view.fell_behind
        )

    def _of_instances(self) -> Iterator[Metric]:
        instances = GaugeMetricFamily(
            f"{_PREFIX}_instances", "Registered instances of each published version.", labels=["app", "version"]
        )
        for app, version, number in self._view.inventory.instances():
            instances.add_metric([app, version], number)
        yield instances
        production = GaugeMetricFamily(
            f"{_PREFIX}_in_production",
            "1 for each version that gets requests without a version: in production, and not of weight 0.",
            labels=["app", "version"],
        )
        for app, version in self._view.inventory.production():
            production.add_metric([app, version], 1)
        yield production
        yield _counter(
            "instances_gone",
            "Instances that left etcd: deregistered at any registry, or their leases expired.",
            self._view.inventory.gone,
        )
        leases = CounterMetricFamily(
            f"{_PREFIX}_leases", "What became of calls of instances at this registry.", labels=["outcome"]
        )
        for outcome in ("registered", "renewed", "deregistered"):
            leases.add_metric([outcome], self._instances.counts[outcome])
        ended = self._calls.ended
        failed = sum(n for (method, status), n in ended.items() if method in _HEARTBEATS and status not in (200, _LEFT))
        leases.add_metric(["failed"], failed)
        yield leases

    def _of_calls(self) -> Iterator[Metric]:
        calls = CounterMetricFamily(
            f"{_PREFIX}_calls",
            "Calls that ended, by the HTTP status of their outcome; 499: the caller has gone.",
            labels=["method", "code"],
        )
        for (method, status), number in self._calls.ended.items():
            calls.add_metric([method, str(status)], number)
        yield calls
        seconds = HistogramMetricFamily(
            f"{_PREFIX}_call_seconds", "The seconds of a call that is no stream.", labels=["method"]
        )
        for method, distribution in self._calls.seconds.items():
            distribution.add_to(seconds, {"method": method})
        yield seconds
        refused = CounterMetricFamily(
            f"{_PREFIX}_operators_refused",
            "Calls of the API for operators by those who are none, or may not.",
            labels=["code"],
        )
        for status in _REFUSALS:
            refused.add_metric([str(status)], self._calls.with_status(self._operating, status))
        yield refused

    def _of_etcd(self) -> Iterator[Metric]:
        calls = CounterMetricFamily(
            f"{_PREFIX}_etcd_calls", "Tries of calls to etcd, by their outcome.", labels=["method", "outcome"]
        )
        tries = self._etcd.tries
        for method in dict.fromkeys(method for method, _ in tries):
            for outcome in (OK, *KINDS):
                calls.add_metric([method, outcome], tries[method, outcome])
        yield calls
        yield _counter("etcd_switches", "Moves to another member of etcd after a failure.", self._etcd.switches)

    def _of_history(self) -> Iterator[Metric]:
        recorder = self._recorder
        yield _gauge("history_revision", "The revision up to which changes are recorded.", recorder.revision)
        yield _counter("history_entries", "Entries of the history that this registry has written.", recorder.written)
        if recorder.entry_s is not None:
            yield _gauge("history_written_timestamp_seconds", "The Unix time of the last of them.", recorder.entry_s)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{_PREFIX}_{name}", text, value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"{_PREFIX}_{name}", text, value)
