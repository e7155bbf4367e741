"""The metrics of an instance, in the Prometheus format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from atserving.counts import Counts, Distribution
from atserving.process_metrics import add_process
from atserving.tls import Tls
from atserving.tracing import Tracer
from evaluator.serving.supervisor import WorkerSupervisor

STAGES = ("fetch", "decode", "queue", "forward", "postprocess", "total")

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics(Collector):
    """The metrics of one instance; every name begins with ``atserving_evaluator_``."""

    def __init__(self, tls: Tls | None = None, tracer: Tracer | None = None) -> None:
        self._tracer = tracer
        self._registry = CollectorRegistry()
        self._requests = Counts()
        self._stages = {f"{name}_ms": Distribution(_SECONDS) for name in STAGES}
        self._batches = Distribution(_SIZES)
        self._restarts = Counter(
            "atserving_evaluator_worker_restarts",
            "How often the net's process died and was started again.",
            registry=self._registry,
        )
        self._registry.register(self)
        add_process(self._registry, "atserving_evaluator", tls)

    def observe(self, status: int, stages_ms: Mapping[str, float]) -> None:
        """Count one finished request."""
        self._requests.add(status)
        for name, milliseconds in stages_ms.items():
            self._stages[name].observe(milliseconds / 1000)

    def collect(self) -> Iterator[Metric]:
        """Yield the counts of requests, for a scrape."""
        yield self._requests.family(
            "atserving_evaluator_requests",
            "Requests, by the HTTP status of their outcome; 499: the caller has gone.",
            "status",
        )
        stages = HistogramMetricFamily(
            "atserving_evaluator_stage_seconds", "The seconds of each stage of a request.", labels=["stage"]
        )
        for name, distribution in self._stages.items():
            distribution.add_to(stages, {"stage": name.removesuffix("_ms")})
        yield stages
        batches = HistogramMetricFamily("atserving_evaluator_batch_size", "Requests in a batch that ran.")
        self._batches.add_to(batches, {})
        yield batches
        if self._tracer:
            yield from self._tracer.families("atserving_evaluator")

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
