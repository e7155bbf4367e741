"""Rules of probes: what they ask, and where."""

from __future__ import annotations

from collections.abc import Iterator

from .containers import GRPC_COMPONENTS
from .model import Container, Document, Manifests, Workload, at

PROBES = {"startupProbe": "start-up", "readinessProbe": "readiness", "livenessProbe": "liveness"}
# The service that the processes' health answers for while they are alive; that of no name, while they can serve.
LIVE = "live"

# What is asked of those that answer by HTTP, and on which port. etcd's /health asks for a leader unless it is asked for
# itself alone, and fails for a database that is full.
_ENVOY_LIVES = ("/live", "ops")
_ETCD_LIVES = ("/health?serializable=true&exclude=NOSPACE", "metrics")
QUESTIONS = {
    "envoy": {"start-up": _ENVOY_LIVES, "liveness": _ENVOY_LIVES, "readiness": ("/health", "http")},
    "etcd": {"start-up": _ETCD_LIVES, "liveness": _ETCD_LIVES, "readiness": ("/health", "metrics")},
}


def probes_are_there(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        for container in workload.lasting:
            for field, name in PROBES.items():
                if field not in container.spec:
                    yield f"{container} has no {name} probe"


def probes_ask_the_protocol(manifests: Manifests) -> Iterator[str]:
    """Our services are asked by gRPC, the others by HTTP: a port that is open says little."""
    for workload in manifests.workloads:
        wanted = "grpc" if workload.component in GRPC_COMPONENTS else "httpGet"
        for container, name, probe in _probes(workload):
            if wanted not in probe:
                yield f"{container}: its {name} probe is no {wanted} one"


def probes_ask_declared_ports(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        for container, name, probe in _probes(workload):
            for how in ("grpc", "httpGet", "tcpSocket"):
                port = at(probe, how, "port")
                if port is not None and not container.declares(port):
                    yield f"{container}: its {name} probe asks port {port}, which it does not declare"


def probes_ask_health_of_a_service(manifests: Manifests) -> Iterator[str]:
    """What can't serve, as what it needs is away, is no better when it is restarted; a start-up probe restarts too."""
    for workload in manifests.workloads:
        for container, name, probe in _probes(workload):
            wanted = "" if name == "readiness" else LIVE
            service = at(probe, "grpc", "service", default="")
            if "grpc" in probe and service != wanted:
                yield f"{container}: its {name} probe asks for {service!r}, should ask for {wanted!r}"


def probes_ask_paths(manifests: Manifests) -> Iterator[str]:
    """As gRPC probes do: whether it answers, or whether it can serve."""
    for workload in manifests.workloads:
        for container, name, probe in _probes(workload):
            question = QUESTIONS.get(workload.component or "", {}).get(name)
            if question and "httpGet" in probe:
                path, port = question
                asked, where = at(probe, "httpGet", "path"), at(probe, "httpGet", "port")
                if asked != path or (container.declares(where) and container.number(where) != container.number(port)):
                    yield f"{container}: its {name} probe asks {asked} on {where}, should ask {path} on {port}"


def _probes(workload: Workload) -> Iterator[tuple[Container, str, Document]]:
    for container in workload.lasting:
        for field, name in PROBES.items():
            if field in container.spec:
                yield container, name, container.spec[field]


RULES = (
    probes_are_there,
    probes_ask_the_protocol,
    probes_ask_declared_ports,
    probes_ask_health_of_a_service,
    probes_ask_paths,
)
