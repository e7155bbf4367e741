"""The metrics of a process that has none of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector


class ProcessMetrics:
    """CPU, memory and files of this process; every name begins with ``<prefix>_process_``."""

    def __init__(self, prefix: str) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(namespace=prefix, registry=self._registry)

    def expose(self, accept: str) -> tuple[bytes, str]:
        """Return the text and its content type, in the format of the scraper's Accept header."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
