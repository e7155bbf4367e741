"""Does every process listen where others look for it: on its ports, behind its Services, at its addresses?"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .flags import PROGRAMS, value_of
from .model import Container, Document, Manifests, at, list_at, title

PORTS = {
    "gate": {"listen": "grpc", "http": "http"},
    "registry": {"listen": "grpc", "listen-operators": "operators", "http": "http"},
    "evaluator": {"listen": "grpc", "http": "http"},
    "etcd": {"listen-client-urls": "client", "listen-peer-urls": "peer", "listen-metrics-urls": "metrics"},
}
"""The flags of each component that set a listening address, and the ports that they are for."""
EVERYWHERE = "0.0.0.0"
COLLECTOR = "traces"
"""The Service that is a name for a collector of spans in another namespace."""
COLLECTOR_PORTS = (4317, 4318)
SCRAPED = "prometheus.io/port"
"""An annotation of a pod template: the port that has metrics."""

_LABELS = {"app": "atserving/app", "version": "atserving/version"}
_LABEL_VALUE = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?"
_URL = re.compile(r"(?:https?|\$\([A-Z_]+\))://")

# An address in an argument or a variable, by a name; not 0.0.0.0:80 or $(POD_IP):80.
_ADDRESS = re.compile(r"(?<![\w.$()-])([a-z][a-z0-9-]*(?:\.[a-z0-9-]+)*):(\d{2,5})(?!\w)")


def programs_listen_on_declared_ports(manifests: Manifests) -> Iterator[str]:
    for container, component in _programs(manifests):
        for flag, port in PORTS[component].items():
            number, address = container.number(port), _address(container, component, flag)
            if number is None:
                yield f"{container} declares no port {port!r}, for --{flag}"
            elif address != f"{EVERYWHERE}:{number}":
                yield f"{container}: --{flag} is {address}, should be {EVERYWHERE}:{number}"


def programs_may_listen_there(manifests: Manifests) -> Iterator[str]:
    """In plain text a program listens on loopback only, unless it is told otherwise."""
    for container, component in _programs(manifests):
        if component in PROGRAMS and container.flag("insecure") is None and container.flag("tls-cert") is None:
            yield f"{container} does not start without --insecure or --tls-cert, as others reach its ports"


def declared_ports_are_listened_on(manifests: Manifests) -> Iterator[str]:
    for container, component in _programs(manifests):
        for port in container.ports:
            if port.get("name") not in PORTS[component].values():
                name = port.get("name", port["containerPort"])
                yield f"{container} declares port {name!r}, and no flag makes it listen there"


def evaluators_register_their_own_address(manifests: Manifests) -> Iterator[str]:
    """The registry hands the advertised address to gates: the pod's own, with the port that it listens on."""
    for container, component in _programs(manifests):
        if component == "evaluator":
            own = [
                f"$({each['name']}):{container.number('grpc')}"
                for each in container.variables
                if at(each, "valueFrom", "fieldRef", "fieldPath") == "status.podIP"
            ]
            advertised = container.flag("advertise")
            if advertised not in own:
                yield f"{container}: --advertise is {advertised}, should be the pod's address with its port grpc"


def labels_name_the_served_version(manifests: Manifests) -> Iterator[str]:
    """A name that no label can hold has a hash in its place, which this rule lets pass."""
    for workload, container in manifests.containers:
        for flag, label in _LABELS.items() if workload.component == "evaluator" else ():
            served, labelled = container.flag(flag), workload.labels.get(label)
            if served is None:
                yield f"{container} has no --{flag}"
            elif re.fullmatch(_LABEL_VALUE, served) and labelled not in (None, served):
                yield f"{container} has --{flag} {served}, and its label {label} is {labelled}"


def service_ports_are_listened_on(manifests: Manifests) -> Iterator[str]:
    for service in manifests.of("Service"):
        for port in list_at(service, "spec", "ports"):
            target, protocol = port.get("targetPort", port["port"]), port.get("protocol", "TCP")
            for workload in manifests.behind(service):
                if workload.number(target, protocol) is None:
                    where = f"port {target} of {workload}"
                    yield f"{title(service)}: its port {port['port']} leads to {where}, which does not exist"


def grpc_services_are_headless(manifests: Manifests) -> Iterator[str]:
    """A gRPC connection lasts: behind one address for all pods, a caller would stay with the first pod it met."""
    for service in grpc_services(manifests):
        if at(service, "spec", "clusterIP") != "None":
            yield f"{title(service)}: should be headless, with clusterIP: None"


def scraped_ports_are_declared(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        port = workload.annotations.get(SCRAPED)
        if port is not None and not (port.isdecimal() and workload.number(int(port))):
            yield f"{workload}: {SCRAPED} is {port}, which it does not declare"


def addresses_are_served(manifests: Manifests) -> Iterator[str]:
    for _, container in manifests.containers:
        texts = [*container.words, *(each.get("value", "") for each in container.variables)]
        addresses = [found for text in texts for found in _ADDRESS.findall(text)]
        for host, port in dict.fromkeys(addresses):
            parts = split_host(manifests, host)
            if parts and not serves(manifests, *parts, int(port)):
                yield f"{container} has the address {host}:{port}, which no pod serves"


def stateful_pods_have_names(manifests: Manifests) -> Iterator[str]:
    """Members of etcd find each other by the names of their pods before any of them is ready."""
    for workload in manifests.workloads:
        if workload.kind == "StatefulSet":
            name = at(workload.document, "spec", "serviceName")
            service = manifests.find("Service", str(name))
            if not service:
                yield f"{workload}: there is no Service {name} to name its pods"
            elif at(service, "spec", "clusterIP") != "None":
                yield f"{workload}: Service {name} names its pods, and is not headless"
            elif not at(service, "spec", "publishNotReadyAddresses"):
                yield f"{workload}: Service {name} names its pods, and needs publishNotReadyAddresses: true"


def grpc_services(manifests: Manifests) -> Iterator[Document]:
    """Yield the Services that lead to the mesh's own programs."""
    for service in manifests.of("Service"):
        if any(each.component in PROGRAMS for each in manifests.behind(service)):
            yield service


def split_host(manifests: Manifests, host: str) -> tuple[str | None, str] | None:
    """Return the pod, if the host names one, and the Service. None for a host outside the mesh."""
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
    """Whether a Service, or one pod behind it, exists and serves a port.

    A headless Service translates no ports: the pods behind it have to listen on the Service's own port.
    A collector of spans is elsewhere.
    """
    service = manifests.find("Service", name)
    if name == COLLECTOR and at(service, "spec", "type") == "ExternalName":
        return port in COLLECTOR_PORTS
    workloads = manifests.behind(service) if service else []
    pods = [f"{each.name}-{number}" for each in workloads for number in range(manifests.replicas(each))]
    if not workloads or (pod is not None and pod not in pods):
        return False
    translated = at(service, "spec", "clusterIP") != "None"
    listening = translated or any(each.number(port) is not None for each in workloads)
    return listening and any(each["port"] == port for each in list_at(service, "spec", "ports"))


def _programs(manifests: Manifests) -> Iterator[tuple[Container, str]]:
    for workload, container in manifests.containers:
        if workload.component in PORTS:
            yield container, workload.component


def _address(container: Container, component: str, flag: str) -> str | None:
    if component == "etcd":
        given = container.flag(flag, "ETCD")
        return given and _URL.sub("", given)
    return value_of(container, component, flag)


RULES = (
    programs_listen_on_declared_ports,
    programs_may_listen_there,
    declared_ports_are_listened_on,
    evaluators_register_their_own_address,
    labels_name_the_served_version,
    service_ports_are_listened_on,
    grpc_services_are_headless,
    scraped_ports_are_declared,
    addresses_are_served,
    stateful_pods_have_names,
)
