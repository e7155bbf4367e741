"""Does Prometheus find the metrics of every pod, under the labels that rules and boards use?"""

from __future__ import annotations

from collections.abc import Iterator

from .model import COMPONENT, Manifests, at, dict_at, list_at, title

METRICS = {"gate": "http", "registry": "http", "evaluator": "http", "envoy": "ops", "etcd": "metrics"}
"""The port of each component that has its metrics."""


def monitors_find_the_ports_of_metrics(manifests: Manifests) -> Iterator[str]:
    for monitor in manifests.of("PodMonitor"):
        ports = [str(each["port"]) for each in list_at(monitor, "spec", "podMetricsEndpoints")]
        for workload in manifests.selected(dict_at(monitor, "spec", "selector")):
            wanted = METRICS.get(workload.component or "")
            if wanted and [wanted] != [port for port in ports if workload.number(port)]:
                yield f"{title(monitor)}: {workload} has its metrics on port {wanted}, not on {', '.join(ports)}"


def monitors_name_jobs_after_components(manifests: Manifests) -> Iterator[str]:
    for monitor in manifests.of("PodMonitor"):
        if (label := at(monitor, "spec", "jobLabel")) != COMPONENT:
            yield f"{title(monitor)}: has jobLabel {label}, should have {COMPONENT}"


def every_pod_is_found_by_one_monitor(manifests: Manifests) -> Iterator[str]:
    monitors = manifests.of("PodMonitor")
    for workload in manifests.workloads if monitors else []:
        found = [title(each) for each in monitors if workload in manifests.selected(dict_at(each, "spec", "selector"))]
        if len(found) != 1:
            yield f"{workload}: should be found by one PodMonitor, is found by {' and '.join(found) or 'none'}"


RULES = (
    monitors_find_the_ports_of_metrics,
    monitors_name_jobs_after_components,
    every_pod_is_found_by_one_monitor,
)
