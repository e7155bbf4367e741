"""Rules of flags that say where a program listens, and what it is: they fit the declared ports and labels."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click

import evaluator.__main__
import gate.__main__
import registry.__main__

from .containers import default_of
from .identity import LABEL_VALUE
from .model import Container, Manifests, at

PROGRAMS: dict[str, click.Command] = {
    "gate": gate.__main__.main,
    "registry": registry.__main__.main,
    "evaluator": evaluator.__main__.main,
}
# Flags, and the names of the ports that they are about. Releases are published on a port that no policy opens.
PORTS = {
    "gate": {"listen": "grpc"},
    "registry": {"listen": "grpc", "listen-releases": "releases"},
    "evaluator": {"listen": "grpc", "http": "http"},
    "etcd": {"listen-client-urls": "client", "listen-peer-urls": "peer", "listen-metrics-urls": "metrics"},
}
EVERYWHERE = "0.0.0.0"

_LABELS = {"app": "atserving/app", "version": "atserving/version"}
_URL = re.compile(r"(?:https?|\$\([A-Z_]+\))://")


def programs_listen_on_declared_ports(manifests: Manifests) -> Iterator[str]:
    for container, component in _programs(manifests):
        for flag, port in PORTS[component].items():
            number, address = container.number(port), _address(container, component, flag)
            if number is None:
                yield f"{container} declares no port {port!r}, for --{flag}"
            elif address != f"{EVERYWHERE}:{number}":
                yield f"{container}: --{flag} is {address}, should be {EVERYWHERE}:{number}"


def declared_ports_are_listened_on(manifests: Manifests) -> Iterator[str]:
    for container, component in _programs(manifests):
        for port in container.ports:
            if port.get("name") not in PORTS[component].values():
                name = port.get("name", port["containerPort"])
                yield f"{container} declares port {name!r}, and listens on it by no flag"


def instances_are_found(manifests: Manifests) -> Iterator[str]:
    """An evaluator is registered by the address of its pod, with the port that it listens on."""
    for container, component in _programs(manifests):
        if component != "evaluator":
            continue
        fields = [
            f"$({each['name']}):{container.number('grpc')}"
            for each in at(container.spec, "env", default=[])
            if at(each, "valueFrom", "fieldRef", "fieldPath") == "status.podIP"
        ]
        advertised = container.flag("advertise")
        if advertised not in fields:
            yield f"{container}: --advertise is {advertised}, should be the pod's address with its port grpc"


def labels_say_what_is_served(manifests: Manifests) -> Iterator[str]:
    """What is no value of a label has another one that stands for it."""
    for workload in manifests.workloads:
        for container in workload.lasting if workload.component == "evaluator" else ():
            for flag, label in _LABELS.items():
                served, labelled = container.flag(flag), workload.labels.get(label)
                if served is None:
                    yield f"{container} has no --{flag}"
                elif re.fullmatch(LABEL_VALUE, served) and labelled not in (None, served):
                    yield f"{container} has --{flag} {served}, and its label {label} is {labelled}"


def _programs(manifests: Manifests) -> Iterator[tuple[Container, str]]:
    for workload in manifests.workloads:
        for container in workload.lasting:
            if workload.component in PORTS:
                yield container, workload.component


def _address(container: Container, component: str, flag: str) -> str | None:
    if component == "etcd":
        given = container.flag(flag, "ETCD")
        return given and _URL.sub("", given)
    given = container.flag(flag)
    default = default_of(PROGRAMS[component], flag)
    return given or (default if isinstance(default, str) else None)


RULES = (
    programs_listen_on_declared_ports,
    declared_ports_are_listened_on,
    instances_are_found,
    labels_say_what_is_served,
)
