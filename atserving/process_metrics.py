"""The metrics that all services have: of their process, and of their certificate."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector

from atserving.tls import Tls


def add_process(registry: CollectorRegistry, prefix: str, tls: Tls | None) -> None:
    """Add the metrics of this process, and with TLS when its certificate expires."""
    ProcessCollector(namespace=prefix, registry=registry)
    if tls:
        expires = Gauge(
            f"{prefix}_certificate_expires_seconds",
            "The Unix time at which the certificate of the process expires.",
            registry=registry,
        )
        expires.set_function(lambda: tls.expires_s)


class ProcessMetrics:
    """The metrics of a process that has none of its own; every name begins with the prefix."""

    def __init__(self, prefix: str, tls: Tls | None) -> None:
        self._registry = CollectorRegistry()
        add_process(self._registry, prefix, tls)

    def expose(self, accept: str) -> tuple[bytes, str]:
        """Return the text and its content type, in the format of the scraper's Accept header."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
