"""The metrics that all services have: of their process, of their log, and of their certificate."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from atserving import telemetry
from atserving.tls import Tls


def add_process(registry: CollectorRegistry, prefix: str, tls: Tls | None) -> None:
    """Add the metrics of this process and of its log, and with TLS when its certificate expires."""
    ProcessCollector(namespace=prefix, registry=registry)
    registry.register(_Log(prefix))
    if tls:
        expires = Gauge(
            f"{prefix}_certificate_expires_seconds",
            "The Unix time at which the certificate of the process expires.",
            registry=registry,
        )
        expires.set_function(lambda: tls.expires_s)


class _Log(Collector):
    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            f"{self._prefix}_log_lines_dropped",
            "Lines of the log that were dropped, as nobody took them in time.",
            telemetry.lines_dropped(),
        )
