"""The metrics that all services have: of their process, and of their certificate."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.process_collector import ProcessCollector

from atserving.tls import Tls


def add_process(registry: CollectorRegistry, prefix: str, tls: Tls | None) -> None:
    """Add the metrics of this process, and with TLS when its certificate expires."""
    ProcessCollector(namespace=prefix, registry=registry)
    if tls:
        begins = Gauge(
            f"{prefix}_certificate_begins_seconds",
            "The Unix time from which on the certificate of the process is valid.",
            registry=registry,
        )
        begins.set_function(lambda: tls.begins_s)
        expires = Gauge(
            f"{prefix}_certificate_expires_seconds",
            "The Unix time at which the certificate of the process expires.",
            registry=registry,
        )
        expires.set_function(lambda: tls.expires_s)
