"""Do probes, hooks and grace periods let pods be replaced without losing requests?"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import registry.__main__

from .flags import PROGRAMS, seconds
from .model import Container, Document, Manifests, at, dict_at, list_at

PROBES = {"startupProbe": "start-up", "livenessProbe": "liveness", "readinessProbe": "readiness"}

# Probes ask for this path on this port; they cannot ask a gRPC server over TLS. etcd's /health without parameters asks
# for a leader, and fails while the database is full.
_ENVOY_LIVES = ("/live", "ops")
_OURS = {"start-up": ("/live", "http"), "liveness": ("/live", "http"), "readiness": ("/ready", "http")}
_ETCD_LIVES = ("/health?serializable=true&exclude=NOSPACE", "metrics")
PATHS = {
    **dict.fromkeys(PROGRAMS, _OURS),
    "envoy": {"start-up": _ENVOY_LIVES, "liveness": _ENVOY_LIVES, "readiness": ("/health", "http")},
    "etcd": {"start-up": _ETCD_LIVES, "liveness": _ETCD_LIVES, "readiness": ("/health", "metrics")},
}

FOUND_BY_NAME = ("gate", "registry")
"""Components whose callers look them up in DNS."""
NAMES_ARE_CACHED_S = 35
"""How long callers may go on with an old DNS answer: CoreDNS caches for 30 s by default, and Envoy asks every 5 s."""

ROLLOUTS: dict[tuple[str, ...], tuple[Any, ...]] = {
    ("paused",): (None, False),
    ("updateStrategy", "type"): (None, "RollingUpdate"),
    ("updateStrategy", "rollingUpdate", "partition"): (None, 0),
}
"""Fields of a workload's spec, and the values with which a rollout goes through to its end."""


def probes_ask_what_processes_answer(manifests: Manifests) -> Iterator[str]:
    """Start-up and liveness ask whether the process answers, readiness whether it can serve.

    A restart does not help a process that cannot serve because another one is down.
    """
    for workload, container in manifests.containers:
        for field, name in PROBES.items():
            probe = container.spec.get(field)
            wanted = _question(container, workload.component or "", name)
            if probe is None:
                yield f"{container} has no {name} probe"
            elif (asked := _asked(container, probe)) != wanted:
                yield f"{container}: its {name} probe asks {asked}, should ask {wanted}"


def grace_is_enough(manifests: Manifests) -> Iterator[str]:
    for workload, container in manifests.containers:
        grace = at(workload.pod, "terminationGracePeriodSeconds", default=30)
        needed = pre_stop_s(container) + _stop_s(container, workload.component)
        if needed == math.inf:
            yield f"{container}: nobody knows how long its preStop hook takes"
        elif needed > grace:
            yield f"{container} may take {needed:g} s to stop, and is killed after {grace} s"


def pods_outlive_dns_answers(manifests: Manifests) -> Iterator[str]:
    """A pod serves on until the callers that found it by name have looked the name up again."""
    for workload, container in manifests.containers:
        if workload.component in FOUND_BY_NAME and pre_stop_s(container) < NAMES_ARE_CACHED_S:
            sleeps = f"sleeps for {pre_stop_s(container):g} s before it stops"
            yield f"{container} {sleeps}, and callers cache its name for {NAMES_ARE_CACHED_S} s"


def updates_take_no_pod_away(manifests: Manifests) -> Iterator[str]:
    """A new pod serves before an old one stops."""
    for workload in manifests.workloads:
        strategy = dict_at(workload.document, "spec", "strategy")
        if workload.kind != "Deployment":
            continue
        if strategy.get("type", "RollingUpdate") != "RollingUpdate":
            yield f"{workload}: its strategy is {strategy['type']}, should be RollingUpdate"
        elif at(strategy, "rollingUpdate", "maxUnavailable") not in (0, "0%"):
            yield f"{workload}: its rolling update should have maxUnavailable: 0"


def rollouts_reach_every_pod(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        for path, allowed in ROLLOUTS.items():
            value = at(workload.document, "spec", *path)
            if value not in allowed:
                yield f"{workload}: {'.'.join(path)} is {value}, which stops rollouts"


def rollouts_can_be_undone(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        if at(workload.document, "spec", "revisionHistoryLimit") == 0:
            yield f"{workload}: has revisionHistoryLimit: 0, so no rollout can be undone"


def pre_stop_s(container: Container) -> float:
    """Return the longest time that the preStop hook takes, in seconds."""
    hook = dict_at(container.spec, "lifecycle", "preStop")
    command = [str(each) for each in list_at(hook, "exec", "command")]
    if not command:
        return float(at(hook, "sleep", "seconds", default=0))
    # sleep SECONDS, or envoy/drain.sh ADMIN AWAY_S MOST_S.
    known = re.search(r"\bsleep ([\d.]+)$|/drain\.sh \S+ ([\d.]+) ([\d.]+)$", " ".join(command))
    return sum(float(each) for each in known.groups() if each) if known else math.inf


def _question(container: Container, component: str, probe: str) -> str:
    """The question that a probe of a component should ask."""
    path, port = PATHS.get(component, {}).get(probe, (None, ""))
    return _get(path, container.number(port))


def _asked(container: Container, probe: Document) -> str:
    if get := probe.get("httpGet"):
        return _get(get.get("path"), container.number(get["port"]) or get["port"])
    return "nothing by HTTP"


def _get(path: str | None, port: int | str | None) -> str:
    return f"GET {path} on port {port}"


def _stop_s(container: Container, component: str | None) -> float:
    """The longest time that the process takes to stop, in seconds; 0 for a process that is not the mesh's own."""
    match component:
        case "gate":
            return seconds(container, component, "drain") + seconds(container, component, "grace")
        case "evaluator":
            return seconds(container, component, "grace")
        case "registry":
            return registry.__main__._GRACE_S
        case _:
            return 0


RULES = (
    probes_ask_what_processes_answer,
    grace_is_enough,
    pods_outlive_dns_answers,
    updates_take_no_pod_away,
    rollouts_reach_every_pod,
    rollouts_can_be_undone,
)
