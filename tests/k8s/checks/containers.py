"""Rules of containers: images, resources, ports, and the time they have to end."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import click

import evaluator.__main__
import gate.__main__
import registry.__main__

from .model import Container, Manifests, at, quantity

GRPC_COMPONENTS = ("gate", "registry", "evaluator")

_PINNED = re.compile(r"[^@]+(:v?\d+\.\d+\.\d+([-.][\w.-]+)?|@sha256:[0-9a-f]{64})")


def images_are_pinned(manifests: Manifests) -> Iterator[str]:
    for container in _all(manifests):
        image = str(container.spec.get("image"))
        if not _PINNED.fullmatch(image.rpartition("/")[2]):
            yield f"{container} has image {image}, which is no exact version and no digest"


def resources_are_bounded(manifests: Manifests) -> Iterator[str]:
    for container in _all(manifests):
        for resource in ("cpu", "memory"):
            for what in ("requests", "limits"):
                if resource not in at(container.spec, "resources", what, default={}):
                    yield f"{container} has no {resource} {what.removesuffix('s')}"


def requests_are_within_limits(manifests: Manifests) -> Iterator[str]:
    for container in _all(manifests):
        requests, limits = (at(container.spec, "resources", each, default={}) for each in ("requests", "limits"))
        for resource, request in requests.items():
            limit = limits.get(resource)
            # What is no part of Kubernetes itself, such as nvidia.com/gpu, can't be overcommitted.
            if "/" in resource and request != limit:
                yield f"{container} requests {request} {resource}, and its limit is {limit}: they should be the same"
            elif limit is not None and quantity(request) > quantity(limit):
                yield f"{container} requests {request} {resource}, more than its limit, {limit}"


def ports_are_unique(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        ports = [port for container in workload.lasting for port in container.ports]
        names = Counter(port["name"] for port in ports if "name" in port)
        numbers = Counter((port["containerPort"], port.get("protocol", "TCP")) for port in ports)
        for port in [name for name, times in names.items() if times > 1]:
            yield f"{workload}: port {port!r} is declared {names[port]} times"
        for (number, protocol), times in numbers.items():
            if times > 1:
                yield f"{workload}: port {number} ({protocol}) is declared {times} times"


def port_names_are_valid(manifests: Manifests) -> Iterator[str]:
    """As RFC 6335 has it, which the server asks for and the schema does not."""
    for container in _all(manifests):
        for name in (str(port["name"]) for port in container.ports if "name" in port):
            valid = re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) and re.search("[a-z]", name) and len(name) <= 15
            if not valid:
                yield f"{container} has a port {name!r}: 15 of a-z, 0-9 and single - at most, a letter among them"


def grace_is_enough(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        grace = at(workload.pod, "terminationGracePeriodSeconds", default=30)
        for container in workload.lasting:
            needed = pre_stop_s(container) + _stop_s(workload.component, container)
            if needed == math.inf:
                yield f"{container}: how long its preStop hook takes is not known"
            elif needed > grace:
                yield f"{container} may take {needed:g} s to stop, and is killed after {grace} s"


def _all(manifests: Manifests) -> Iterator[Container]:
    for workload in manifests.workloads:
        yield from workload.containers


def pre_stop_s(container: Container) -> float:
    """How long the hook takes at most that runs before the container is told to stop."""
    hook = at(container.spec, "lifecycle", "preStop", default={})
    command = [str(each) for each in at(hook, "exec", "command", default=[])]
    if not command:
        return float(at(hook, "sleep", "seconds", default=0))
    # sleep SECONDS, or envoy/drain.sh ADMIN AWAY_S MOST_S; of other commands nobody knows.
    known = re.search(r"\bsleep ([\d.]+)$|/drain\.sh \S+ ([\d.]+) ([\d.]+)$", " ".join(command))
    return sum(float(each) for each in known.groups() if each) if known else math.inf


def _stop_s(component: str | None, container: Container) -> float:
    """How long the program takes to stop at most, by its flags; 0 where it is not ours."""
    match component:
        case "gate":
            return seconds(gate.__main__.main, container, "drain") + seconds(gate.__main__.main, container, "grace")
        case "evaluator":
            return seconds(evaluator.__main__.main, container, "grace")
        case "registry":
            return registry.__main__._GRACE_S
        case _:
            return 0


def seconds(program: click.Command, container: Container, flag: str) -> float:
    """A flag as the container gives it, or else as the program has it."""
    given = container.flag(flag)
    return float(given if given is not None else default_of(program, flag))


def default_of(program: click.Command, flag: str) -> Any:
    """What a program takes for a flag that it is not given."""
    return next(each.default for each in program.params if f"--{flag}" in each.opts)


RULES = (
    images_are_pinned,
    resources_are_bounded,
    requests_are_within_limits,
    ports_are_unique,
    port_names_are_valid,
    grace_is_enough,
)
