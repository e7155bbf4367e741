"""Rules of where things are found: Services, ports of metrics, and the addresses that containers are given."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .containers import GRPC_COMPONENTS
from .model import Document, Manifests, Workload, at, selects, title

# The annotation of a pod template that says where metrics are.
SCRAPED = "prometheus.io/port"

# An address in an argument or a variable, by a name; not 0.0.0.0:80 or $(POD_IP):80.
_ADDRESS = re.compile(r"(?<![\w.$()-])([a-z][a-z0-9-]*(?:\.[a-z0-9-]+)*):(\d{2,5})(?!\w)")


def services_select_pods(manifests: Manifests) -> Iterator[str]:
    for service in manifests.of("Service"):
        if not behind(manifests, service):
            yield f"{title(service)}: selects no pods"


def services_stay_inside(manifests: Manifests) -> Iterator[str]:
    for service in manifests.of("Service"):
        if at(service, "spec", "type") == "ExternalName":
            yield f"{title(service)}: is of type ExternalName, which leads out of the mesh"


def service_ports_are_listened_on(manifests: Manifests) -> Iterator[str]:
    for service in manifests.of("Service"):
        for port in at(service, "spec", "ports", default=[]):
            target, protocol = port.get("targetPort", port["port"]), port.get("protocol", "TCP")
            for workload in behind(manifests, service):
                if workload.number(target, protocol) is None:
                    where = f"port {target} of {workload}"
                    yield f"{title(service)}: its port {port['port']} leads to {where}, which has none"


def service_ports_are_named(manifests: Manifests) -> Iterator[str]:
    """Each its own where there are several, which the server asks for and the schema does not."""
    for service in manifests.of("Service"):
        names = [each.get("name") for each in at(service, "spec", "ports", default=[])]
        if len(names) > 1 and (None in names or len(set(names)) < len(names)):
            yield f"{title(service)}: its ports should have names, each its own"


def services_have_ports(manifests: Manifests) -> Iterator[str]:
    for service in manifests.of("Service"):
        if not at(service, "spec", "ports"):
            yield f"{title(service)}: has no ports"


def grpc_is_balanced_by_callers(manifests: Manifests) -> Iterator[str]:
    """A connection of gRPC lasts: by one address for all pods, a caller would stay with the pod that it met first."""
    for service in manifests.of("Service"):
        grpc = any(each.component in GRPC_COMPONENTS for each in behind(manifests, service))
        if grpc and at(service, "spec", "clusterIP") != "None":
            yield f"{title(service)}: should be headless, with clusterIP: None"


def scraped_ports_are_listened_on(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        port = workload.annotations.get(SCRAPED)
        if port is not None and not (port.isdecimal() and workload.number(int(port))):
            yield f"{workload}: {SCRAPED} is {port}, which it has not"


def addresses_are_served(manifests: Manifests) -> Iterator[str]:
    """A headless Service translates no ports: what is asked for is what the pods behind it should listen on."""
    for workload in manifests.workloads:
        for container in workload.containers:
            texts = [*at(container.spec, "command", default=[]), *at(container.spec, "args", default=[])]
            texts += [each.get("value", "") for each in at(container.spec, "env", default=[])]
            addresses = [found for text in texts for found in _ADDRESS.findall(text)]
            for host, port in dict.fromkeys(addresses):
                place = inside(manifests, host)
                if place and not serves(manifests, *place, int(port)):
                    yield f"{container} has the address {host}:{port}, which leads nowhere"


def inside(manifests: Manifests, host: str) -> tuple[str | None, str] | None:
    """The pod, if one is named, and the Service that a host is of; None where the host is outside of the mesh."""
    namespaces = [at(each, "metadata", "name") for each in manifests.of("Namespace")]
    labels = host.removesuffix(".cluster.local").removesuffix(".svc").split(".")
    if len(labels) > 1 and labels[-1] in namespaces:
        labels.pop()
    if len(labels) == 1 and host != "localhost":
        return None, labels[0]
    if len(labels) == 2 and manifests.find("Service", labels[1]):
        return labels[0], labels[1]
    return None


def serves(manifests: Manifests, pod: str | None, name: str, port: int) -> bool:
    """Whether a Service, or one pod behind it, is there and has a port."""
    service = manifests.find("Service", name)
    if not service:
        return False
    workloads = behind(manifests, service)
    if pod is not None and pod not in [
        f"{w.name}-{number}" for w in workloads for number in range(manifests.replicas(w))
    ]:
        return False
    headless = at(service, "spec", "clusterIP") == "None"
    listening = not headless or any(each.number(port) is not None for each in workloads)
    return listening and any(each["port"] == port for each in at(service, "spec", "ports", default=[]))


def behind(manifests: Manifests, service: Document) -> list[Workload]:
    """The workloads whose pods a Service selects."""
    selector = at(service, "spec", "selector", default={})
    return [each for each in manifests.workloads if selector and selects({"matchLabels": selector}, each.labels)]


RULES = (
    services_select_pods,
    services_have_ports,
    services_stay_inside,
    service_ports_are_listened_on,
    service_ports_are_named,
    grpc_is_balanced_by_callers,
    scraped_ports_are_listened_on,
    addresses_are_served,
)
