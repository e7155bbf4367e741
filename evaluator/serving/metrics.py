"""The metrics of an instance, in the Prometheus format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from atserving.counts import Counts, Distribution, latency_bounds
from atserving.held import HeldBytes
from atserving.process_metrics import add_process
from atserving.tls import Tls
from atserving.tracing import Tracer
from evaluator.serving.capacity import REFUSALS, Capacity
from evaluator.serving.gpu_state import GpuReader, GpuState
from evaluator.serving.supervisor import WorkerSupervisor

STAGES = ("fetch", "decode", "queue", "forward", "postprocess", "total")

_PREFIX = "atserving_evaluator"
_SECONDS = latency_bounds(0.0005)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class _Labelled(CollectorRegistry):
    """A registry whose metrics all have some labels."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        super().__init__()
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        for family in super().collect():
            family.samples = [each._replace(labels={**self._labels, **each.labels}) for each in family.samples]
            yield family


class Metrics(Collector):
    """The metrics of one instance; every name begins with ``atserving_evaluator_``, each with the app and version."""

    def __init__(self, app: str, version: str, tls: Tls | None = None, tracer: Tracer | None = None) -> None:
        self._tracer = tracer
        self._registry = _Labelled({"app": app, "version": version})
        self._requests = Counts()
        self._refusals: Counter[str] = Counter()
        self._stages = {f"{name}_ms": Distribution(_SECONDS) for name in STAGES}
        self._total = self._stages["total_ms"]
        self._batches = Distribution(_SIZES)
        self._restarts = 0
        self._gpu: GpuReader | None = None
        self._gpu_state: GpuState | None = None
        self._registry.register(self)
        add_process(self._registry, _PREFIX, tls)

    def observe(
        self, status: int, stages_ms: Mapping[str, float], refusal: str = "", traceparent: bytes | None = None
    ) -> None:
        """Count one finished request; ``refusal`` is why it was refused, if it was."""
        self._requests.add(status)
        if refusal:
            self._refusals[refusal] += 1
        for name, milliseconds in stages_ms.items():
            self._stages[name].observe(milliseconds / 1000)
        if traceparent:
            self._total.trace(stages_ms["total_ms"] / 1000, traceparent)

    def collect(self) -> Iterator[Metric]:
        """Yield the counts of requests, for a scrape."""
        yield self._requests.family(
            f"{_PREFIX}_requests", "Requests, by the HTTP status of their outcome; 499: the caller has gone.", "code"
        )
        refusals = CounterMetricFamily(
            f"{_PREFIX}_refusals", "Requests that the instance has refused, by the reason.", labels=["reason"]
        )
        for reason in REFUSALS:
            refusals.add_metric([reason], self._refusals[reason])
        yield refusals
        stages = HistogramMetricFamily(
            f"{_PREFIX}_stage_seconds", "The seconds of each stage of a request.", labels=["stage"]
        )
        for name, distribution in self._stages.items():
            distribution.add_to(stages, {"stage": name.removesuffix("_ms")})
        yield stages
        batches = HistogramMetricFamily(f"{_PREFIX}_batch_size", "Requests in a batch that ran.")
        self._batches.add_to(batches, {})
        yield batches
        yield CounterMetricFamily(
            f"{_PREFIX}_worker_restarts", "How often the net's process died and was started again.", self._restarts
        )
        if self._gpu_state:
            yield from _of_gpu(self._gpu_state)
        if self._tracer:
            yield from self._tracer.families(_PREFIX)

    def of_worker(self, worker: WorkerSupervisor) -> None:
        """Count the worker's batches and restarts, and show its memory and CPU next to those of this process."""
        worker.on_batch = self._batches.observe
        worker.on_restart = self._restarted
        self._gauge("queue_length", "Requests in flight that wait for a thread of the worker.", lambda: worker.queued)
        self._gauge("worker_away", "1 while the worker restarts or stands still.", lambda: worker.is_away)
        ProcessCollector(namespace=f"{_PREFIX}_worker", pid=lambda: worker.pid or "none", registry=self._registry)

    def of_gpu(self, reader: GpuReader) -> None:
        """Show the state of the GPU that the worker uses."""
        self._gpu = reader

    def _restarted(self) -> None:
        self._restarts += 1

    def of_capacity(self, capacity: Capacity, held: HeldBytes, connections: Callable[[], int]) -> None:
        """Show the requests in flight and the bytes held, with their limits, and the connections of gates."""
        for name, text, value in (
            ("requests_in_flight", "Requests in flight, without those that fetch.", lambda: capacity.in_flight),
            ("requests_fetching", "Requests whose resources the instance fetches.", lambda: capacity.fetching),
            ("max_concurrent", "The limit of requests in flight, and of those that fetch.", lambda: capacity.limit),
            ("held_bytes", "Bytes of requests and answers that the instance holds.", lambda: held.held),
            ("max_held_bytes", "The most that it may hold.", lambda: held.most),
            ("connections", "Links of gates.", connections),
        ):
            self._gauge(name, text, value)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(f"{_PREFIX}_{name}", text, registry=self._registry).set_function(value)

    async def page(self, accept: str) -> tuple[bytes, str]:
        """Return the text and its content type, in the format of the scraper's Accept header."""
        if self._gpu:
            self._gpu_state = await self._gpu.state()
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


def _of_gpu(state: GpuState) -> Iterator[Metric]:
    for name, text, value in (
        ("memory_used_bytes", "Memory of the GPU in use, by whatever process.", state.used_bytes),
        ("memory_total_bytes", "Memory of the GPU.", state.total_bytes),
        ("utilisation_ratio", "The share of time in which the GPU was at work.", state.utilisation),
    ):
        if value is not None:
            family = GaugeMetricFamily(f"{_PREFIX}_gpu_{name}", text, labels=["gpu"])
            family.add_metric([state.gpu], value)
            yield family
