"""The metrics of an instance, in the Prometheus format."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector

from evaluator.serving.supervisor import WorkerSupervisor

STAGES = ("fetch", "decode", "queue", "forward", "postprocess", "total")

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one instance; every name begins with ``atserving_evaluator_``."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        own = self._registry
        self._requests = Counter(
            "atserving_evaluator_requests",
            "Requests, by the HTTP status of their outcome; 499: the caller has gone.",
            ["status"],
            registry=own,
        )
        stages = Histogram(
            "atserving_evaluator_stage_seconds",
            "The seconds of each stage of a request.",
            ["stage"],
            buckets=_SECONDS,
            registry=own,
        )
        self._stages = {f"{name}_ms": stages.labels(name) for name in STAGES}
        self._batches = Histogram(
            "atserving_evaluator_batch_size", "Requests in a batch that ran.", buckets=_SIZES, registry=own
        )
        self._restarts = Counter(
            "atserving_evaluator_worker_restarts",
            "How often the net's process died and was started again.",
            registry=own,
        )
        ProcessCollector(namespace="atserving_evaluator", registry=self._registry)

    def observe(self, status: int, stages_ms: Mapping[str, float]) -> None:
        """Count one finished request."""
        self._requests.labels(str(status)).inc()
        for name, milliseconds in stages_ms.items():
            self._stages[name].observe(milliseconds / 1000)

    def of_worker(self, worker: WorkerSupervisor) -> None:
        """Count the worker's batches and restarts, and show its memory and CPU next to those of this process."""
        worker.on_batch = self._batches.observe
        worker.on_restart = self._restarts.inc
        self._gauge("queue_length", "Requests in flight that wait for a thread of the worker.", lambda: worker.queued)
        ProcessCollector(
            namespace="atserving_evaluator_worker", pid=lambda: worker.pid or "none", registry=self._registry
        )

    def of_capacity(self, in_flight: Callable[[], float], limit: Callable[[], float]) -> None:
        """Show the requests in flight, and their limit."""
        self._gauge("requests_held", "Requests in flight, from their arrival to their reply.", in_flight)
        self._gauge("max_concurrent", "The limit of requests in flight.", limit)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(f"atserving_evaluator_{name}", text, registry=self._registry).set_function(value)

    def expose(self, accept: str) -> tuple[bytes, str]:
        """Return the text and its content type, in the format of the scraper's Accept header."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
