"""The metrics of a gate's own state: its connections, its config, the bytes that it holds, its traces."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from atserving.follower import ConfigFollower
from atserving.grpc_server import Server
from atserving.held import HeldBytes
from atserving.tracing import Tracer


class StateMetrics(Collector):
    """The families of the state, for a scrape."""

    def __init__(self, server: Server, follower: ConfigFollower, held: HeldBytes, tracer: Tracer | None = None) -> None:
        self._tracer = tracer
        self._server = server
        self._follower = follower
        self._held = held

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        follower = self._follower
        for name, text, value in (
            ("connections", "Connections of Envoy, and of who calls the gate directly.", self._server.connections),
            ("config_revision", "The etcd revision of the config.", follower.revision),
            ("config_followed", "Whether the gate follows a registry: 1 or 0.", follower.is_following),
            ("config_age_seconds", "Seconds since the gate last followed a registry; 0 while it does.", follower.age_s),
            ("held_bytes", "Bytes of requests and answers that the gate holds.", self._held.held),
            ("max_held_bytes", "The most that it may hold.", self._held.most),
        ):
            yield GaugeMetricFamily(f"atserving_gate_{name}", text, value)
        yield CounterMetricFamily(
            "atserving_gate_connections_refused",
            "Connections that were one too many.",
            self._server.refused_connections,
        )
        if self._tracer:
            yield from self._tracer.families("atserving_gate")
